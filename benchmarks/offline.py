"""Answers of the demo's base under guidance without a server: `transformers.generate` with the server's own runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steersman.benchmarks.answers import Answer, Answers, measure
from steersman.benchmarks.settings import Prompt, Setting
from steersman.demo import MODELS
from steersman.guidance.generate import GuidanceLogitsProcessor, load_runtime
from steersman.guidance.runtime import GuidanceRuntime
from steersman.training.world.sampling import MAX_NEW_TOKENS

_BATCH = 150


@dataclass(frozen=True)
class Guided:
    """The base, and the models that guide it."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runtime: GuidanceRuntime

    def answer(self, setting: Setting, prompts: Sequence[Prompt], seed: int) -> Answers:
        """One answer to each prompt, a text: sampled at temperature 1, or greedy where the setting's temperature is 0.
        Other sampling fields are not looked at."""
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].text or ""))
        found: dict[int, Answer] = {}
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                found |= zip(batch, self._answer(setting, [prompts[n] for n in batch]), strict=True)
        return [[found[n]] for n in range(len(prompts))]

    def _answer(self, setting: Setting, prompts: Sequence[Prompt]) -> list[Answer]:
        inputs = self.tokenizer([str(p.text) for p in prompts], padding=True, padding_side="left", return_tensors="pt")
        processors = []
        if setting.guidance is not None:
            processors = [GuidanceLogitsProcessor(self.base, self.runtime, setting.guidance, inputs["attention_mask"])]
        sampling: dict[str, Any] = {"do_sample": False}
        if setting.fields.get("temperature", 1) > 0:
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        sequences = self.base.generate(**inputs, **sampling, logits_processor=processors, max_new_tokens=MAX_NEW_TOKENS)
        reports: list[Mapping[str, Any]] = [{}] * len(prompts)
        for processor in processors:
            reports = [asdict(report) for report in processor.finish(sequences) if report is not None]
        responses = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._measure(setting, *row) for row in zip(prompts, responses, reports, strict=True)]

    def _measure(self, setting: Setting, prompt: Prompt, response: list[int], report: Mapping[str, Any]) -> Answer:
        end = self.tokenizer.eos_token_id
        finished = end in response
        tokens = response.index(end) + 1 if finished else len(response)
        text = str(self.tokenizer.decode(response[:tokens], skip_special_tokens=True))
        return measure(setting, prompt, text, finished, report, tokens=tokens)


def load_guided(reward_models: Mapping[str, Path], policies: Mapping[str, Path]) -> Guided:
    """The demo's base with models by name."""
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    paths = [{name: str(path) for name, path in models.items()} for models in (reward_models, policies)]
    return Guided(base, tokenizer, load_runtime(tokenizer, *paths, base_path=str(MODELS / "base")))
