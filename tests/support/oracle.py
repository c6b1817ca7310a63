"""The naive reference over real checkpoints: plain transformers forwards, no cache of any kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.guidance.plan import Plan, compile_plan
from steersman.guidance.reference import (
    Logits,
    ReferenceModels,
    ReferenceStep,
    Rewards,
    reference_kl,
    reference_replay,
    reference_step,
)
from steersman.guidance.request import parse_guidance
from tests.support.tiny import COMMON, END, VOCABULARY

NEAR_TIE = 1e-4
"""Below this margin in nats float32 cannot tell the two best candidates, or the sides of a threshold, apart."""


@dataclass
class Oracle:
    """Answers as the papers' own scripts would give them."""

    models: ReferenceModels
    base: Path
    """The base model's folder."""

    @cached_property
    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval().base_model

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """The base's hidden state [D] behind a text, by a full forward."""
        with torch.inference_mode():
            return self._base(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0, -1].clone()

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Next-token logits of the frozen base."""
        return self.models.base(tokens)

    def step(
        self, tokens: Sequence[int], guidance: dict[str, Any], position: int = 0, spent: float = 0.0
    ) -> ReferenceStep:
        """One position."""
        return reference_step(tokens, parse_guidance(guidance), self.models, position, spent)  # type: ignore[arg-type]

    def replay(self, prompt: Sequence[int], response: Sequence[int], guidance: dict[str, Any]) -> list[ReferenceStep]:
        """The steps of an answer that somebody else chose."""
        return reference_replay(prompt, response, parse_guidance(guidance), self.models)  # type: ignore[arg-type]

    def assert_greedy(self, prompt: Sequence[int], guidance: dict[str, Any], answer: Sequence[int], limit: int) -> int:
        """Every token is the reference's best one behind the tokens before it, and the answer ends where it must.

        Where the reference itself is a near tie, either of the tied candidates is right; where a gate's decision is
        one, or an estimate may go the other way, so is the best token of its other side. Returns the number of near
        ties that were met; estimates are not counted.
        """
        assert len(answer) == limit or (answer[-1] == END and len(answer) < limit)
        assert END not in answer[:-1]
        ties = 0
        for n, (step, token) in enumerate(zip(self.replay(prompt, answer, guidance), answer, strict=True)):
            if token == int(step.logprobs.argmax()):
                continue
            short = _behind(step, token)
            if step.doubt < doubt_of(guidance):
                sides = self._both_sides([*prompt, *answer[:n]], guidance, n)
                short = min(short, *(_behind(side, token) for side in sides))
            assert short < NEAR_TIE, (
                f"prompt {list(prompt)} with {guidance}: token {n} is {token}, the reference has "
                f"{int(step.logprobs.argmax())} by {short:.2g} nats, its gate decided by {step.doubt:.2g}"
            )
            ties += min(step.margin, step.doubt) < NEAR_TIE
        return ties

    def _both_sides(self, tokens: Sequence[int], guidance: dict[str, Any], position: int) -> list[ReferenceStep]:
        """The step with every threshold passed, and with none."""
        return [
            self.step(tokens, {key: _threshold_at(value, key, at) for key, value in guidance.items()}, position)
            for at in (0.0, 1e6)
        ]

    def assert_report(
        self, prompt: Sequence[int], guidance: dict[str, Any], response: Sequence[int], report: dict[str, Any]
    ) -> bool:
        """Rewards within 1e-5 of the largest of the answer's candidates; KL, interventions and counts as the
        reference has them.

        False, and nothing is compared, where a gate's decision was a near tie or an estimate may have gone the other
        way.
        """
        steps = self.replay(prompt, response, guidance)
        assert report["tokens"] == len(response)
        if any(s.doubt < doubt_of(guidance) for s in steps):
            return False
        assert report["guided_tokens"] == sum(s.guided for s in steps)
        assert abs(report["kl"] - reference_kl(steps, response)) < 2e-4 * max(1, len(response))
        truncation = sum(s.kl_truncation for s in steps if s.guided)
        assert abs(report["kl_truncation"] - truncation) < 2e-4 * max(1, len(response))
        assert report["kl_steering"] == pytest.approx(report["kl"] - report["kl_truncation"], abs=1e-6)
        changed = sum(int(s.logprobs.argmax() != s.base_logprobs.argmax()) for s in steps)
        ties = sum(s.margin < NEAR_TIE for s in steps)
        assert abs(report["interventions"] - changed) <= ties
        for name, values in steps[-1].rewards.items():
            expected = float(values[steps[-1].candidates.index(response[-1])])
            size = max(1.0, *(float(s.rewards[name].abs().max()) for s in steps if name in s.rewards))
            assert abs(report["rewards"][name] - expected) < 1e-5 * size, (name, expected, report)
        return True


def _behind(step: ReferenceStep, token: int) -> float:
    """Nats between the best token and this one."""
    return float(step.logprobs.max() - step.logprobs[token])


def _threshold_at(value: Any, key: str, at: float) -> Any:
    if key == "gate":
        return {name: _threshold_at(part, name, at) for name, part in value.items()}
    return at if key in ("threshold", "kl_above", "entropy_above") else value


def doubt_of(guidance: dict[str, Any]) -> float:
    """How far from its threshold a gate's exact quantity must be for its decision to be certain, in nats."""
    gate = {**guidance, **guidance.get("gate", {})}
    if gate.get("estimator") == "monte_carlo":
        # The log ratios of the test models deviate by less than 3 nats: six standard errors of their mean.
        return 6 * 3 / gate.get("samples", 1000) ** 0.5
    return NEAR_TIE


def load_oracle(
    models: Path, names: Sequence[str] = ("first", "second"), policies: Sequence[str] = ("expert", "other")
) -> Oracle:
    """An oracle over `models/base`, the causal reward models `names` and the policies."""
    return Oracle(
        ReferenceModels(
            language_model(models / "base"),
            END,
            {
                **{name: causal_rewards(models / name) for name in names},
                "every": vocabulary_rewards(models / "every"),
                "atop": head_rewards(models / "atop", models / "base"),
            },
            {
                **{name: language_model(models / name) for name in policies},
                "tilted": head_policy(models / "tilted", models / "base"),
            },
        ),
        models / "base",
    )


def language_model(folder: Path) -> Logits:
    """Full forwards of a causal language model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            # A vocabulary padded for speed has logits for tokens that do not exist.
            return model(input_ids=torch.tensor([list(tokens)])).logits[0, -1, :VOCABULARY]

    return logits


def draw_hidden(prompt: Sequence[int]) -> torch.Tensor:
    """[D] float64: a hidden state that depends on the prompt and nothing else."""
    generator = torch.Generator().manual_seed(hash(tuple(prompt)) % 2**31)
    return torch.randn(COMMON["hidden_size"], generator=generator, dtype=torch.float64, device="cpu")


def reference_over(
    models: Path, rewards: Sequence[str] = ("first", "second"), policies: Sequence[str] = ("expert", "other")
) -> Callable[[torch.Tensor, list[int], dict[str, Any]], torch.Tensor]:
    """The reference's log-probabilities for any logits of the base, a prompt and a guidance object; hidden states are
    `draw_hidden`'s."""
    own: dict[str, Rewards] = {name: causal_rewards(models / name) for name in rewards}
    own["every"] = vocabulary_rewards(models / "every")
    own["atop"] = before_the_last(head_over(models / "atop", draw_hidden))
    known: dict[str, Logits] = {name: language_model(models / name) for name in policies}
    tilt = head_over(models / "tilted", draw_hidden)

    def reference(logits: torch.Tensor, prompt: list[int], guidance: dict[str, Any]) -> torch.Tensor:
        sources = ReferenceModels(lambda _: logits, END, own, {**known, "tilted": lambda tokens: logits + tilt(tokens)})
        return reference_step(prompt, parse_guidance(guidance), sources).logprobs  # type: ignore[arg-type]

    return reference


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


def vocabulary_rewards(folder: Path) -> Rewards:
    """Full forwards of a reward model with a vocabulary head: a text's reward is its last token's output before it."""
    return before_the_last(language_model(folder))


def before_the_last(outputs: Logits) -> Rewards:
    """Rewards of texts, of which each has its last token's output in front of it."""

    def rewards(texts: list[list[int]]) -> torch.Tensor:
        after = {prefix: outputs(prefix) for prefix in {tuple(text[:-1]) for text in texts}}
        return torch.stack([after[tuple(text[:-1])][text[-1]] for text in texts])

    return rewards


def head_outputs(folder: Path, base: Path) -> Logits:
    """A head's outputs for every token, in float64, by full forwards of its base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()

    def hidden(tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model.base_model(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0, -1]

    return head_over(folder, hidden)


def head_over(folder: Path, hidden: Logits) -> Logits:
    """U f(h) + c, f(h) = W₂ silu(W₁ h + b₁) + b₂, in float64, over hidden states [D] float64 by tokens."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "head.safetensors").items()}

    def outputs(tokens: Sequence[int]) -> torch.Tensor:
        middle = weights["inner.weight"] @ hidden(tokens) + weights["inner.bias"]
        features = weights["outer.weight"] @ (middle * torch.sigmoid(middle)) + weights["outer.bias"]
        return weights["tokens"] @ features + weights["bias"]

    return outputs


def head_rewards(folder: Path, base: Path) -> Rewards:
    """Rewards by a head: a text's is its last token's output before it."""
    return before_the_last(head_outputs(folder, base))


def head_policy(folder: Path, base: Path) -> Logits:
    """Logits of a policy head: the base's and the head's outputs."""
    logits, outputs = language_model(base), head_outputs(folder, base)
    return lambda tokens: logits(tokens) + outputs(tokens)


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
    return compile_plan(parse_guidance(guidance))  # type: ignore[arg-type]
