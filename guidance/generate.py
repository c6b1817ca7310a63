"""Adapter for `transformers.generate`: the same guidance without a server."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from steersman.guidance.plan import compile_plan
from steersman.guidance.report import Report
from steersman.guidance.request import GuidanceError, parse_guidance
from steersman.guidance.rewards import load_reward_model
from steersman.guidance.runtime import GuidanceRuntime, Row

_calls = count()


def load_runtime(
    base_tokenizer: PreTrainedTokenizerBase,
    reward_models: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 256 * 2**20,
) -> GuidanceRuntime:
    """A runtime with the named checkpoints; `cache_bytes` bounds the key-value cache of each."""
    models = {
        name: load_reward_model(name, path, base_tokenizer, dtype=dtype, device=device, cache_bytes=cache_bytes)
        for name, path in reward_models.items()
    }
    return GuidanceRuntime(models, base_tokenizer.eos_token_id)


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides one call of `generate` by greedy search or sampling.

    guidance: one guidance object for the whole batch, or one (or None) for each prompt.
    attention_mask: that of the prompts, [prompts, length]; needed when they are padded.

        processor = GuidanceLogitsProcessor(runtime, {"method": "pargs", "reward_model": "helpful"}, mask)
        sequences = model.generate(ids, attention_mask=mask, logits_processor=[processor])
        reports = processor.finish(sequences)
    """

    def __init__(
        self,
        runtime: GuidanceRuntime,
        guidance: Mapping[str, Any] | Sequence[Mapping[str, Any] | None],
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        self.runtime = runtime
        self.attention_mask = attention_mask
        objects = [guidance] if isinstance(guidance, Mapping) else list(guidance)
        self._plans = [None if g is None else compile_plan(parse_guidance(dict(g))) for g in objects]
        for plan in self._plans:
            for term in () if plan is None else plan.rewards:
                if term.model not in runtime.reward_models:
                    known = ", ".join(sorted(runtime.reward_models)) or "none"
                    raise GuidanceError("guidance", f"no reward model {term.model!r} is loaded; loaded are: {known}")
        self._call = next(_calls)
        self._rows: list[Row | None] | None = None
        self._prompt_length = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids [B, L], scores [B, V]; returns guided scores in float32."""
        tokens = input_ids.tolist()
        if self._rows is None:
            self._begin(tokens)
        assert self._rows is not None
        logits = scores.float().clone()
        live = []
        for row, sequence in zip(self._rows, tokens, strict=True):
            if row is None:
                continue
            output = sequence[self._prompt_length :]
            if row.output != output[: len(row.output)]:
                raise ValueError("guidance follows one sequence a row: beam search is not supported, use do_sample")
            row.output = output
            if not output or output[-1] != self.runtime.eos_token_id:
                live.append(row)
        if live:
            self.runtime.step(logits, live)
        return logits

    def finish(self, sequences: torch.Tensor) -> list[Report | None]:
        """Releases the caches; what guidance did to each row of generate's result [B, L], None for unguided rows.

        Raises RuntimeError for a row that could not be scored.
        """
        reports: list[Report | None] = []
        for row, sequence in zip(self._rows or (), sequences.tolist(), strict=True):
            response = self._response(sequence)
            report = None if row is None else self.runtime.finish(row.request.key, response)
            if report is not None and report.error is not None:
                raise RuntimeError(report.error)
            reports.append(report)
        self._rows = None
        return reports

    def _begin(self, tokens: list[list[int]]) -> None:
        self._prompt_length = len(tokens[0])
        plans = _spread(self._plans, len(tokens), "guidance objects")
        masks: list[list[int] | None] = [None]
        if self.attention_mask is not None:
            masks = list(self.attention_mask.tolist())
        self._rows = []
        for n, (plan, mask, sequence) in enumerate(
            zip(plans, _spread(masks, len(tokens), "rows of attention_mask"), tokens, strict=True)
        ):
            prompt = sequence if mask is None else [t for t, kept in zip(sequence, mask, strict=True) if kept]
            request = None if plan is None else self.runtime.start((self._call, n), plan, len(prompt))
            self._rows.append(None if request is None else Row(n, request, prompt, []))

    def _response(self, sequence: list[int]) -> list[int]:
        response = sequence[self._prompt_length :]
        end = self.runtime.eos_token_id
        return response[: response.index(end) + 1] if end in response else response


def _spread(values: list[Any], rows: int, what: str) -> list[Any]:
    """Repeats one value per prompt for every row that generate made of it (num_return_sequences)."""
    if rows % len(values):
        raise ValueError(f"{len(values)} {what} do not fit a batch of {rows} rows")
    return [value for value in values for _ in range(rows // len(values))]
