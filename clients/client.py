"""The official OpenAI client, sync and async, with guidance; needs neither torch nor vLLM.

from steersman.clients.client import Steersman, guidance_of, pargs

client = Steersman(base_url="http://127.0.0.1:8000/v1")
answer = client.completions.create(model="base", prompt="Once", guidance=pargs("helpful", beta=1.5))
print(answer.choices[0].text, guidance_of(answer.choices[0]).rewards)
"""

from typing import Any

from openai import AsyncOpenAI, OpenAI
from openai._compat import cached_property

from steersman.clients.methods import (
    GuidanceLike,
    args,
    best_of_n,
    blockwise,
    kl_threshold,
    length_control,
    mixed,
    pargs,
    product,
)
from steersman.clients.reports import Candidate, GuidanceReport, LoadedModel, ServerGuidance, TracedToken, guidance_of
from steersman.clients.resources import AsyncGuidedChat, AsyncGuidedCompletions, GuidedChat, GuidedCompletions
from steersman.guidance.request import Gate, GuidanceError, Reward, RewardGuidance

__all__ = [
    "AsyncSteersman",
    "Candidate",
    "Gate",
    "GuidanceError",
    "GuidanceLike",
    "GuidanceReport",
    "LoadedModel",
    "Reward",
    "RewardGuidance",
    "ServerGuidance",
    "Steersman",
    "TracedToken",
    "args",
    "best_of_n",
    "blockwise",
    "guidance_of",
    "kl_threshold",
    "length_control",
    "mixed",
    "pargs",
    "product",
]

DEFAULT_URL = "http://127.0.0.1:8000/v1"


class Steersman(OpenAI):
    """The official client; `completions.create` and `chat.completions.create` take `guidance`."""

    # An OpenAI key in the environment is not this server's business: unlike the SDK's own, the default is no key.
    def __init__(self, *, base_url: Any = DEFAULT_URL, api_key: Any = "none", **options: Any) -> None:
        super().__init__(base_url=base_url, api_key=api_key, **options)

    @cached_property
    def completions(self) -> GuidedCompletions:
        """Completions that take `guidance`."""
        return GuidedCompletions(self)

    @cached_property
    def chat(self) -> GuidedChat:
        """Chat completions that take `guidance`."""
        return GuidedChat(self)

    def guidance(self) -> ServerGuidance:
        """Methods, models, presets and limits of the server."""
        return ServerGuidance.model_validate(self.get("/guidance", cast_to=object))


class AsyncSteersman(AsyncOpenAI):
    """The official asynchronous client; `completions.create` and `chat.completions.create` take `guidance`."""

    def __init__(self, *, base_url: Any = DEFAULT_URL, api_key: Any = "none", **options: Any) -> None:
        super().__init__(base_url=base_url, api_key=api_key, **options)

    @cached_property
    def completions(self) -> AsyncGuidedCompletions:
        """Completions that take `guidance`."""
        return AsyncGuidedCompletions(self)

    @cached_property
    def chat(self) -> AsyncGuidedChat:
        """Chat completions that take `guidance`."""
        return AsyncGuidedChat(self)

    async def guidance(self) -> ServerGuidance:
        """Methods, models, presets and limits of the server."""
        return ServerGuidance.model_validate(await self.get("/guidance", cast_to=object))
