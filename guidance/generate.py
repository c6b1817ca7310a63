"""Adapter for `transformers.generate`: the same guidance without a server."""

import weakref
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.checkpoints import declared_quantization, find_window
from steersman.guidance.head_models import Drift, HeadModel, ServedBase, require_shape
from steersman.guidance.plan import Plan, compile_plan
from steersman.guidance.policies import load_policy
from steersman.guidance.report import Report
from steersman.guidance.request import BestOfN, Blockwise, GuidanceError, parse_guidance, policies, reward_models
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.tokenizers import check_ids, name_model

_calls = count()


def load_runtime(
    base_tokenizer: PreTrainedTokenizerBase,
    reward_models: Mapping[str, str],
    policies: Mapping[str, str] | None = None,
    *,
    base_path: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 256 * 2**20,
) -> GuidanceRuntime:
    """A runtime with the named checkpoints; `cache_bytes` bounds the key-value cache of each.

    base_path: the base model's checkpoint, needed for policies that are adapters over it.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "cache_bytes": cache_bytes}
    return GuidanceRuntime(
        {name: load_reward_model(name, path, base_tokenizer, **options) for name, path in reward_models.items()},
        base_tokenizer.eos_token_id,
        {
            name: load_policy(name, path, base_path, base_tokenizer, **options)
            for name, path in (policies or {}).items()
        },
    )


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides one call of `generate` by greedy search or sampling.

    model: what `generate` is called on; its own logits are guided, and not what processors in front of this one have
    made of them. Masks and additions of theirs act on the guided logits once, a repetition penalty by as much as it
    changed the model's own; give a penalty behind this processor to apply it to the guided logits themselves.
    guidance: one guidance object for the whole batch, or one (or None) for each prompt.
    attention_mask: that of the prompts, [prompts, length]; needed when they are padded.
    seed: of the Monte Carlo estimates; every row has its own from it.

        processor = GuidanceLogitsProcessor(model, runtime, {"method": "pargs", "reward_model": "helpful"}, mask)
        sequences = model.generate(ids, attention_mask=mask, logits_processor=[processor])
        reports = processor.finish(sequences)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: GuidanceRuntime,
        guidance: Mapping[str, Any] | Sequence[Mapping[str, Any] | None],
        attention_mask: torch.Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.runtime = runtime
        self.attention_mask = attention_mask
        self.seed = seed
        objects = [guidance] if isinstance(guidance, Mapping) else list(guidance)
        self._plans = [None if g is None else _plan(runtime, g) for g in objects]
        self._call = next(_calls)
        self._own: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        named = {name for plan in self._plans if plan is not None for name in plan.models}
        for name in sorted(named & runtime.models.heads.keys()):
            prove_on(model, runtime.models.heads[name])
        self._hooks = [
            model.register_forward_hook(self._keep_logits),
            model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden),
        ]
        self._rows: list[Row | None] | None = None
        self._prompt_length = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [B, L], scores [B, V]; returns guided scores in float32."""
        tokens = input_ids.tolist()
        if self._rows is None:
            self._begin(tokens)
        assert self._rows is not None
        if self._own is None:
            raise RuntimeError("guidance needs the logits of the model that it was given: call generate on that one")
        logits, self._own = self._own.to(torch.float32, copy=True), None
        live = []
        for row, sequence in zip(self._rows, tokens, strict=True):
            if row is None:
                continue
            output = sequence[self._prompt_length :]
            if row.output != output[: len(row.output)]:
                raise ValueError("guidance follows one sequence a row: beam search is not supported, use do_sample")
            row.output = output
            # A finished row goes on in the batch with padding.
            if self.runtime.eos_token_id not in output:
                live.append(row)
        scores = scores.float()
        if not live:
            return scores
        changed = not torch.equal(logits, scores)
        change = (scores - logits).masked_fill(scores.isneginf(), -torch.inf) if changed else None
        self.runtime.step(logits, live, biased=scores if changed else None, hidden=self._hidden)
        guided = logits if change is None else logits + change
        index = torch.tensor([row.index for row in live], device=scores.device)
        return scores.index_copy(0, index, guided[index])

    def _keep_logits(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._own = output.logits[:, -1].detach()

    def _keep_hidden(self, module: torch.nn.Module, inputs: Any) -> None:
        self._hidden = inputs[0][:, -1].detach()

    def finish(self, sequences: torch.Tensor) -> list[Report | None]:
        """Releases the caches; what guidance did to each row of generate's result [B, L], None for unguided rows.

        Raises RuntimeError for a row that could not be scored.
        """
        for hook in self._hooks:
            hook.remove()
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
        prompts = [
            sequence if mask is None else [t for t, kept in zip(sequence, mask, strict=True) if kept]
            for mask, sequence in zip(_spread(masks, len(tokens), "rows of attention_mask"), tokens, strict=True)
        ]
        for plan, prompt in zip(plans, prompts, strict=True):
            if plan is not None:
                check_ids((self.runtime.models.by_name[name] for name in plan.models), prompt, "prompt")
        self._rows = []
        for n, (plan, prompt) in enumerate(zip(plans, prompts, strict=True)):
            request = None if plan is None else self.runtime.start((self._call, n), plan, len(prompt), self.seed + n)
            self._rows.append(None if request is None else Row(n, request, prompt, []))

    def _response(self, sequence: list[int]) -> list[int]:
        response = sequence[self._prompt_length :]
        end = self.runtime.eos_token_id
        return response[: response.index(end) + 1] if end in response else response


def _plan(runtime: GuidanceRuntime, value: Mapping[str, Any]) -> Plan:
    guidance = parse_guidance(dict(value))
    if isinstance(guidance, BestOfN | Blockwise):
        raise GuidanceError("guidance.method", f"{guidance.method} works on whole samples: it needs the server")
    for what, named, loaded in (
        ("reward model", reward_models(guidance), sorted(runtime.reward_models)),
        ("policy", policies(guidance), sorted(runtime.policies)),
    ):
        for field, name in named:
            if name not in loaded:
                raise GuidanceError(field, f"no {what} {name!r} is loaded; loaded are: {', '.join(loaded) or 'none'}")
    plan = compile_plan(guidance)
    if (
        plan.reward_models
        and not plan.formula.has_candidates
        and not all(map(runtime.models.scores_every_token, plan.reward_models))
    ):
        raise GuidanceError("guidance.top_k", "null needs reward models that return the reward of every next token")
    return plan


@torch.inference_mode()
def prove_on(model: PreTrainedModel, head: HeadModel) -> Drift:
    """Compares a head's base with a transformers model, unless it was the last that the head was compared with. Returns
    how far its outputs drift on the model; raises ModelRefused where it does not fit."""
    if head.proven_on() is not model or head.drift is None:
        config = model.config.get_text_config()
        width = model.get_output_embeddings().out_features
        served = ServedBase(config.hidden_size, config.num_hidden_layers, width, find_window(model.config))
        head.quantization = declared_quantization(model.config)
        require_shape(name_model(head), "this", head.base, served)
        ends: list[torch.Tensor] = []
        layer = model.get_output_embeddings()
        with layer.register_forward_pre_hook(lambda _, inputs: ends.append(inputs[0][0, -1])):
            for text in head.probe.texts:
                model(torch.tensor([text], device=model.device), use_cache=False)
        head.prove(torch.stack(ends))
        head.proven_on = weakref.ref(model)
    assert head.drift is not None
    return head.drift


def _spread(values: list[Any], rows: int, what: str) -> list[Any]:
    """Repeats one value per prompt for every row that generate made of it (num_return_sequences)."""
    if rows % len(values):
        raise ValueError(f"{len(values)} {what} do not fit a batch of {rows} rows")
    return [value for value in values for _ in range(rows // len(values))]
