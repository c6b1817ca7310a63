"""The answer of a search, put together from the chosen samples by vLLM's own output processor.

An answer of several blocks is several requests to vLLM, each of which begins anew. Their tokens are fed to one output
processor, as if one request had generated them: text, stop strings, min_tokens, log-probabilities, finish reasons and
what a stream holds back are those of a plain answer of the same tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from steersman.server.vllm import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    LogprobsLists,
    OutputProcessor,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)


class Answer:
    """One answer that grows by chosen samples, put together by vLLM's output processor as those of a plain request."""

    def __init__(self, tokenizer: Any, request_id: str, params: SamplingParams, first: RequestOutput) -> None:
        """params: the request's own. first: vLLM's output for the request without any token of the answer in its
        prompt."""
        self.tokens: list[int] = []
        self.finished = False
        self._id = request_id
        self._params = params
        self._cached_tokens = first.num_cached_tokens
        self._processor = OutputProcessor(tokenizer, log_stats=False)
        request = EngineCoreRequest(
            request_id=request_id,
            external_req_id=request_id,
            prompt_token_ids=first.prompt_token_ids,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=first.lora_request,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._processor.add_request(request, first.prompt)

    def trim(self, sample: CompletionOutput) -> CompletionOutput:
        """The part of a sample that would be shown behind this answer: up to the token that completes a stop string,
        which may have begun in an earlier block."""
        if not self._params.stop:
            return sample
        detokenizer = _copy(self._processor.request_states[self._id].detokenizer)
        shown = len(detokenizer.get_next_output_text(finished=True, delta=False))
        kept, tokens = 0, list(sample.token_ids)
        stop = None
        for token, finish in zip(tokens, self._finishes(sample), strict=True):
            stop = detokenizer.update([token], finish is FinishReason.STOP)
            kept += 1
            if stop is not None:
                break
        text = detokenizer.get_next_output_text(finished=True, delta=False)[shown:]
        if kept == len(tokens):
            return replace(sample, text=text)
        logprobs = None if sample.logprobs is None else sample.logprobs[:kept]
        return replace(
            sample, token_ids=tokens[:kept], text=text, logprobs=logprobs, finish_reason="stop", stop_reason=stop
        )

    def extend(self, sample: CompletionOutput) -> RequestOutput | None:
        """Appends a trimmed sample; returns what vLLM would put out for its tokens, None where that is nothing yet."""
        merged: RequestOutput | None = None
        delta = self._params.output_kind is RequestOutputKind.DELTA
        finishes = self._finishes(sample)
        for place, (token, finish) in enumerate(zip(sample.token_ids, finishes, strict=True)):
            output = EngineCoreOutput(
                request_id=self._id,
                new_token_ids=[token],
                new_logprobs=None if sample.logprobs is None else self._to_lists(sample.logprobs[place]),
                finish_reason=finish,
                stop_reason=None if finish is None else sample.stop_reason,
            )
            for made in self._processor.process_outputs([output]).request_outputs:
                if merged is None:
                    merged = made
                else:
                    merged.add(made, aggregate=delta)
        self.tokens += sample.token_ids
        self.finished = not self._processor.has_request(self._id)
        if merged is not None:
            merged.num_cached_tokens = self._cached_tokens
        return merged

    def _finishes(self, sample: CompletionOutput) -> list[FinishReason | None]:
        """For each token of a sample why vLLM's scheduler would end the answer there. Stop strings are not for it to
        find, and the end of a block is not the end of the answer."""
        last: FinishReason | None = None
        by_string = sample.finish_reason == "stop" and isinstance(sample.stop_reason, str)
        if by_string or sample.finish_reason == "length":
            if len(self.tokens) + len(sample.token_ids) >= (self._params.max_tokens or 1):
                last = FinishReason.LENGTH
        elif sample.finish_reason is not None:
            last = FinishReason[sample.finish_reason.upper()]
        return [None] * (len(sample.token_ids) - 1) + [last]

    def _to_lists(self, position: Mapping[int, Any]) -> LogprobsLists:
        """A token's log-probabilities as vLLM's sampler returns them: the sampled token, then the listed ones in the
        order of their ranks. The sampled one may be among these, where its rank is that of its place in the list."""
        entries = list(position.items())
        wanted = self._params.num_logprobs
        # With -1 the whole vocabulary is listed, the sampled token with it.
        listed = entries[1:] if wanted is not None and 0 <= wanted < len(entries) else entries
        rows = [entries[0], *sorted(listed, key=lambda entry: entry[1].rank)]
        return LogprobsLists(
            np.array([[token for token, _ in rows]]),
            np.array([[entry.logprob for _, entry in rows]]),
            np.array([entries[0][1].rank]),
        )


def _copy(detokenizer: Any) -> Any:
    """A detokenizer in the same state, whose updates leave the original alone. The tokenizer is shared."""
    copied = copy.copy(detokenizer)
    for name, value in vars(detokenizer).items():
        if isinstance(value, list):
            setattr(copied, name, list(value))
        elif isinstance(value, DecodeStream):
            setattr(copied, name, copy.deepcopy(value))
    return copied
