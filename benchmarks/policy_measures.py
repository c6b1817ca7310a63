"""What a policy of the demo world is worth alone: gold of its answers by aspect, and test pairs over its training."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steersman.benchmarks.runs import logged
from steersman.benchmarks.settings import world_prompts
from steersman.benchmarks.signals import gold_pairs
from steersman.benchmarks.statistics import estimate
from steersman.demo import MODELS
from steersman.training.implicit_reward import token_log_ratios
from steersman.training.policies.losses import sequential_kl
from steersman.training.world import gold
from steersman.training.world.sampling import sample

ASPECTS = tuple(field.name for field in fields(gold.Gold))
_PAIRS = 200
_BATCH = 50


@dataclass(frozen=True)
class MeasurePolicy:
    """Measures the policy in a folder, once; a job."""

    folder: Path
    split: str
    """tuning or reporting: the prompts that it answers, and for reporting also its checkpoints on test pairs."""
    first: int
    count: int
    seed: int
    out: Path | None = None
    """Where the file goes, if not beside the weights."""

    @property
    def path(self) -> Path:
        """The file of what was measured."""
        return (self.out or self.folder) / f"{self.split}-{self.first}-{self.count}.json"

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self.path.is_file()

    def into(self, folder: Path) -> "MeasurePolicy":
        """The same with its file in another folder."""
        return replace(self, out=folder)

    def read(self) -> dict[str, Any]:
        """What was measured."""
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def __call__(self) -> None:
        with logged(self.path.with_suffix(".log")):
            found = self._measure()
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(self.path)

    def _measure(self) -> dict[str, Any]:
        base, policy = _load(MODELS / "base"), _load(self.folder)
        found = measure_answers(policy, base, self.split, self.first, self.count, self.seed)
        if self.split == "reporting":
            checkpoints = sorted(self.folder.glob("checkpoint-*"), key=_step)
            found["training"] = [{"step": _step(path), **measure_pairs(_load(path), base)} for path in checkpoints]
        return found


def measure_answers(policy: Any, base: Any, split: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """Gold of its answers at temperature 1, by aspect and in all; their KL from the base, nats an answer."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    prompts = [prompt.text or "" for prompt in world_prompts(split)][first : first + count]
    answers = sample(policy, tokenizer, prompts, seed, f"{split} prompts")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    golds = [gold.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    rows = list(zip(tokenizer(prompts)["input_ids"], answers, strict=True))
    ratios = [float(row.sum()) for row in token_log_ratios(policy, base, rows, _BATCH)]
    by_aspect = {aspect: estimate([asdict(own)[aspect] for own in golds]).mean for aspect in ASPECTS}
    return {
        "gold": {**by_aspect, "total": estimate([own.total for own in golds]).mean},
        "kl": estimate(ratios).mean,
        "tokens": estimate([len(ids) for ids in answers]).mean,
    }


def measure_pairs(policy: Any, base: Any) -> dict[str, float]:
    """Of test pairs, the better one by gold as the chosen: accuracy of the implicit reward, and sequential KL."""
    pairs = gold_pairs(AutoTokenizer.from_pretrained(MODELS / "base"))[:_PAIRS]
    ratios, kls = zip(
        *(
            read_responses(policy, base, [(row.prompt, getattr(row, side)) for row in pairs])
            for side in ("chosen", "rejected")
        ),
        strict=True,
    )
    right = torch.where(ratios[0] == ratios[1], 0.5, (ratios[0] > ratios[1]).double())
    return {
        "accuracy": right.mean().item(),
        "sequential_kl_chosen": kls[0].mean().item(),
        "sequential_kl_rejected": kls[1].mean().item(),
    }


@torch.inference_mode()
def read_responses(
    policy: PreTrainedModel, base: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ log π/π₀ and Σ KL(π₀‖π) over the tokens of each response, [N] float64, nats.

    rows: prompt and response, as token ids.
    """
    ratios, kls = [], []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        ids = pad_sequence([torch.tensor(prompt + response) for prompt, response in part], batch_first=True)
        spans = [(len(prompt), len(prompt) + len(response)) for prompt, response in part]
        places = torch.arange(1, ids.shape[1])  # padding lies behind: no causal model's response sees it
        mask = torch.stack([(places >= begin) & (places < end) for begin, end in spans])
        ours, theirs = (model(input_ids=ids).logits[:, :-1].double() for model in (policy, base))
        difference = ours.log_softmax(dim=-1) - theirs.log_softmax(dim=-1)
        each = difference.gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        ratios.append(torch.where(mask, each, 0.0).sum(dim=1))
        kls.append(sequential_kl(theirs, ours, mask))
    return torch.cat(ratios), torch.cat(kls)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
