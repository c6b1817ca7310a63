"""The SDK's completions and chat completions with one more argument, `guidance`."""

from collections.abc import Mapping
from typing import Any, Unpack, overload

from openai import AsyncStream, Stream
from openai._compat import cached_property
from openai.resources.chat import AsyncChat, Chat
from openai.resources.chat.completions import AsyncCompletions as AsyncChatCompletions
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import AsyncCompletions, Completions
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatFields,
)
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsStreaming as ChatStreamFields,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionFields,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsStreaming as CompletionStreamFields,
)
from typing_extensions import TypedDict  # the SDK's own; a TypedDict of typing cannot be mixed with those

from steersman.clients.methods import GuidanceLike, to_json


class _Options(TypedDict, total=False):
    extra_headers: Mapping[str, Any] | None
    extra_query: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None
    timeout: Any


class _CompletionFields(CompletionFields, _Options):
    pass


class _CompletionStreamFields(CompletionStreamFields, _Options):
    pass


class _ChatFields(ChatFields, _Options):
    pass


class _ChatStreamFields(ChatStreamFields, _Options):
    pass


class GuidedCompletions(Completions):
    """`client.completions`."""

    @overload  # type: ignore[override]
    def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_CompletionStreamFields]
    ) -> Stream[Completion]: ...
    @overload
    def create(self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_CompletionFields]) -> Completion: ...
    def create(self, *, guidance: GuidanceLike | None = None, **fields: Any) -> Completion | Stream[Completion]:
        """OpenAI's completions, steered."""
        return super().create(**_with_guidance(fields, guidance))


class AsyncGuidedCompletions(AsyncCompletions):
    """`client.completions` of the asynchronous client."""

    @overload  # type: ignore[override]
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_CompletionStreamFields]
    ) -> AsyncStream[Completion]: ...
    @overload
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_CompletionFields]
    ) -> Completion: ...
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Any
    ) -> Completion | AsyncStream[Completion]:
        """OpenAI's completions, steered."""
        return await super().create(**_with_guidance(fields, guidance))


class GuidedChatCompletions(ChatCompletions):
    """`client.chat.completions`."""

    @overload  # type: ignore[override]
    def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_ChatStreamFields]
    ) -> Stream[ChatCompletionChunk]: ...
    @overload
    def create(self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_ChatFields]) -> ChatCompletion: ...
    def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Any
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """OpenAI's chat completions, steered."""
        return super().create(**_with_guidance(fields, guidance))

    def parse(self, *, guidance: GuidanceLike | None = None, **fields: Any) -> Any:
        """The SDK's `parse`, steered: the answer as an object of the pydantic class in `response_format`."""
        return super().parse(**_with_guidance(fields, guidance))


class AsyncGuidedChatCompletions(AsyncChatCompletions):
    """`client.chat.completions` of the asynchronous client."""

    @overload  # type: ignore[override]
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_ChatStreamFields]
    ) -> AsyncStream[ChatCompletionChunk]: ...
    @overload
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Unpack[_ChatFields]
    ) -> ChatCompletion: ...
    async def create(
        self, *, guidance: GuidanceLike | None = None, **fields: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """OpenAI's chat completions, steered."""
        return await super().create(**_with_guidance(fields, guidance))

    async def parse(self, *, guidance: GuidanceLike | None = None, **fields: Any) -> Any:
        """The SDK's `parse`, steered: the answer as an object of the pydantic class in `response_format`."""
        return await super().parse(**_with_guidance(fields, guidance))


class GuidedChat(Chat):
    """`client.chat`."""

    @cached_property
    def completions(self) -> GuidedChatCompletions:
        """Chat completions that take `guidance`."""
        return GuidedChatCompletions(self._client)


class AsyncGuidedChat(AsyncChat):
    """`client.chat` of the asynchronous client."""

    @cached_property
    def completions(self) -> AsyncGuidedChatCompletions:
        """Chat completions that take `guidance`."""
        return AsyncGuidedChatCompletions(self._client)


def _with_guidance(fields: dict[str, Any], guidance: GuidanceLike | None) -> dict[str, Any]:
    if guidance is None:
        return fields
    return {**fields, "extra_body": {**(fields.get("extra_body") or {}), "guidance": to_json(guidance)}}
