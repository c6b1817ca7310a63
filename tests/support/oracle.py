"""The naive reference over real checkpoints: plain transformers forwards, no cache of any kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.guidance.plan import Plan, compile_plan
from steersman.guidance.reference import ReferenceStep, Rewards, reference_greedy, reference_kl, reference_step
from steersman.guidance.request import parse_guidance
from tests.support.tiny import END

NEAR_TIE = 1e-4
"""Below this margin in nats float32 cannot tell the two best candidates apart."""


@dataclass
class Oracle:
    """Answers as the papers' own scripts would give them."""

    base: Any
    rewards: dict[str, Rewards]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Next-token logits of the frozen base."""
        with torch.inference_mode():
            return self.base(input_ids=torch.tensor([list(tokens)])).logits[0, -1]

    def step(self, tokens: Sequence[int], guidance: dict[str, Any]) -> ReferenceStep:
        """One position."""
        return reference_step(tokens, plan_of(guidance), self.logits, self.rewards, END)

    def greedy(
        self, prompt: Sequence[int], guidance: dict[str, Any], max_tokens: int
    ) -> tuple[list[int], list[ReferenceStep]]:
        """The greedy answer and its steps."""
        return reference_greedy(prompt, plan_of(guidance), self.logits, self.rewards, END, max_tokens)

    def replay(self, prompt: Sequence[int], response: Sequence[int], guidance: dict[str, Any]) -> list[ReferenceStep]:
        """The steps of an answer that somebody else chose."""
        return [self.step([*prompt, *response[:n]], guidance) for n in range(len(response))]

    def assert_greedy(self, prompt: Sequence[int], guidance: dict[str, Any], answer: Sequence[int], limit: int) -> int:
        """The answer is the reference's; where the reference itself is a near tie, either candidate is right.

        Returns the number of near ties that went the other way.
        """
        expected, steps = self.greedy(prompt, guidance, limit)
        if list(answer) == expected:
            return 0
        place = next(n for n, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b)
        assert steps[place].margin < NEAR_TIE, (
            f"prompt {list(prompt)} with {guidance}: token {place} is {answer[place]}, the reference has "
            f"{expected[place]} by a margin of {steps[place].margin:.2g}"
        )
        return 1

    def assert_report(
        self, prompt: Sequence[int], guidance: dict[str, Any], response: Sequence[int], report: dict[str, Any]
    ) -> None:
        """Rewards within 1e-5 of the candidates' largest; KL, interventions and counts as the reference has them."""
        steps = self.replay(prompt, response, guidance)
        assert report["tokens"] == report["guided_tokens"] == len(response)
        assert abs(report["kl"] - reference_kl(steps, response)) < 1e-4 * max(1, len(response))
        changed = sum(int(s.logprobs.argmax() != s.base_logprobs.argmax()) for s in steps)
        ties = sum(s.margin < NEAR_TIE for s in steps)
        assert abs(report["interventions"] - changed) <= ties
        for name, values in steps[-1].rewards.items():
            expected = float(values[steps[-1].candidates.index(response[-1])])
            size = max(1.0, float(values.abs().max()))
            assert abs(report["rewards"][name] - expected) < 1e-5 * size, (name, expected, report)


def load_oracle(models: Path, names: Sequence[str] = ("first", "second")) -> Oracle:
    """An oracle over `models/base` and the causal reward models `names`."""
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()
    return Oracle(base, {name: causal_rewards(models / name) for name in names})


def causal_rewards(folder: Path) -> Rewards:
    """Full forwards of a causal reward model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def rewards(texts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(texts)
        with torch.inference_mode():
            # The head is read at the last token whatever it is, also where the pad token stands there.
            hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            return model.score(hidden[:, -1])[:, 0]

    return rewards


def text_rewards(folder: Path, models: Path) -> Rewards:
    """Full forwards of a text reward model over the base's decoded tokens, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    own, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(models / "base")

    def rewards(texts: list[list[int]]) -> torch.Tensor:
        values = []
        for text in texts:
            decoded = base.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            with torch.inference_mode():
                values.append(model(**own(decoded, return_tensors="pt")).logits[0, 0])
        return torch.stack(values)

    return rewards


def plan_of(guidance: dict[str, Any]) -> Plan:
    """The plan of a JSON guidance object."""
    return compile_plan(parse_guidance(guidance))
