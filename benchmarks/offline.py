"""Answers of the demo's base under guidance without a server: the server's own runtime in a loop of plain torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.benchmarks.answers import Answers, measure
from steersman.benchmarks.settings import Prompt, Setting
from steersman.demo import MODELS
from steersman.guidance.generate import load_runtime, prove_on
from steersman.guidance.plan import compile_plan
from steersman.guidance.request import BestOfN, Blockwise, parse_guidance
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.training.world.sampling import sample

_BATCH = 150
_calls = count()


@dataclass(frozen=True)
class Guided:
    """The base, and the models that guide it."""

    base: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    runtime: GuidanceRuntime

    def answer(self, setting: Setting, prompts: Sequence[Prompt], seed: int) -> Answers:
        """One answer to each prompt, a text: sampled at temperature 1, or greedy where the setting's temperature is 0.
        Other sampling fields are not looked at. Raises RuntimeError for a row that could not be scored."""
        ids = self.tokenizer([str(prompt.text) for prompt in prompts])["input_ids"]
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        found: Answers = [[] for _ in prompts]
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            responses, reports = self._respond(setting, [prompts[n] for n in batch], [ids[n] for n in batch], seed)
            for n, response, report in zip(batch, responses, reports, strict=True):
                text = str(self.tokenizer.decode(response, skip_special_tokens=True))
                finished = response[-1] == self.tokenizer.eos_token_id
                found[n].append(measure(setting, prompts[n], text, finished, report, tokens=len(response)))
        return found

    def _respond(
        self, setting: Setting, prompts: Sequence[Prompt], ids: Sequence[list[int]], seed: int
    ) -> tuple[list[list[int]], Sequence[Mapping[str, Any]]]:
        """Responses as token ids, and their reports, empty without guidance."""
        texts = [str(prompt.text) for prompt in prompts]
        if setting.guidance is None:
            responses = sample(self.base, self.tokenizer, texts, seed, setting.name, len(texts))
            return responses, [{}] * len(texts)
        guide = _RuntimeGuide(self.runtime, setting, ids, seed)
        responses = sample(self.base, self.tokenizer, texts, seed, setting.name, len(texts), guide)
        return responses, guide.finish()


class _RuntimeGuide:
    """A guide of one batch of `sample`, by a runtime, which must be told every token: so it draws them itself, and
    returns logits that leave no other."""

    def __init__(self, runtime: GuidanceRuntime, setting: Setting, prompts: Sequence[list[int]], seed: int) -> None:
        """prompts: token ids, in the order in which `sample` decodes them: by length."""
        guidance = parse_guidance(dict(setting.guidance or {}))
        if isinstance(guidance, BestOfN | Blockwise):
            raise ValueError(f"{setting.name}: {guidance.method} works on whole samples, and needs the server")
        plan = compile_plan(guidance)
        call = next(_calls)
        self._runtime = runtime
        self._greedy = setting.fields.get("temperature", 1) == 0
        self._generator = torch.Generator().manual_seed(seed)
        self._responses: list[list[int]] = [[] for _ in prompts]
        self._rows = [
            Row(n, runtime.start((call, n), plan, len(prompt), seed + n), prompt, response)
            for n, (prompt, response) in enumerate(zip(prompts, self._responses, strict=True))
        ]
        self._alive = list(range(len(prompts)))

    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """hidden [B, D] and logits [B, V] of the rows that have not ended."""
        guided = logits.float().clone()
        for index, n in enumerate(self._alive):
            self._rows[n].index = index
        self._runtime.step(guided, [self._rows[n] for n in self._alive], hidden=hidden)
        if self._greedy:
            tokens = guided.argmax(dim=1, keepdim=True)
        else:
            tokens = torch.multinomial(guided.softmax(-1), 1, generator=self._generator)
        for n, token in zip(self._alive, tokens[:, 0].tolist(), strict=True):
            self._responses[n].append(token)
        self._alive = [n for n in self._alive if self._responses[n][-1] != self._runtime.eos_token_id]
        return torch.full_like(guided, -torch.inf).scatter(1, tokens, 0.0)

    def finish(self) -> list[Mapping[str, Any]]:
        """Releases the caches; the report of each row."""
        reports: list[Mapping[str, Any]] = []
        for row, response in zip(self._rows, self._responses, strict=True):
            report = self._runtime.finish(row.request.key, response)
            assert report is not None
            if report.error is not None:
                raise RuntimeError(report.error)
            reports.append(asdict(report))
        return reports


def load_guided(reward_models: Mapping[str, Path], policies: Mapping[str, Path]) -> Guided:
    """The demo's base with models by name; raises ModelRefused for a head that does not fit it."""
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    paths = [{name: str(path) for name, path in models.items()} for models in (reward_models, policies)]
    runtime = load_runtime(tokenizer, *paths, base_path=str(MODELS / "base"))
    for head in runtime.models.heads.values():
        prove_on(base, head)
    return Guided(base, tokenizer, runtime)
