"""Laws that every decoding method obeys, as assertions over one step of the runtime."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.oracle import draw_hidden, plan_of

Guidances = Sequence[dict[str, Any] | None]


def step(
    runtime: GuidanceRuntime, logits: torch.Tensor, prompts: Sequence[list[int]], guidances: Guidances
) -> torch.Tensor:
    """One step over a copy of `logits` [B, V] for new requests, on the models' device; None leaves a row unguided. The
    base's hidden states are `draw_hidden`'s. Leaves nothing behind."""
    guided = logits.to(_device(runtime), copy=True)
    rows = []
    for n, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True)):
        if guidance is not None:
            rows.append(Row(n, runtime.start(("law", n), plan_of(guidance), len(prompt)), prompt, []))
    hidden = torch.stack([draw_hidden(prompt) for prompt in prompts]).to(guided)
    runtime.step(guided, rows, hidden=hidden)
    for row in rows:
        assert row.request.error is None, row.request.error
        runtime.finish(row.request.key, [])
    return guided.to(logits.device)


def _device(runtime: GuidanceRuntime) -> torch.device:
    """Where the auxiliary models are."""
    model: Any = next(iter([*runtime.reward_models.values(), *runtime.policies.values()]))
    return torch.device(model.model.device)


def assert_zero_strength_keeps_the_supports_logits(
    runtime: GuidanceRuntime, logits: torch.Tensor, prompts: Sequence[list[int]], guidance: dict[str, Any]
) -> None:
    """With β = 0 every token of the support has the base's logit bit for bit."""
    guided = step(runtime, logits, prompts, [{**guidance, "beta": 0.0}] * len(prompts))
    support = guided > -torch.inf
    assert torch.equal(guided[support], logits[support])
    assert support.sum(-1).tolist() == [min(guidance["top_k"], int((row > -torch.inf).sum())) for row in logits]


def assert_masked_tokens_stay_masked(
    runtime: GuidanceRuntime, logits: torch.Tensor, prompts: Sequence[list[int]], guidance: dict[str, Any]
) -> None:
    """A token that a grammar has masked is never given back, even where fewer than k are left."""
    masked = logits.clone()
    masked[:, 4:] = torch.where(torch.rand(masked[:, 4:].shape) < 0.98, -torch.inf, masked[:, 4:])
    guided = step(runtime, masked, prompts, [guidance] * len(prompts))
    assert torch.all(guided[masked == -torch.inf] == -torch.inf)
    assert torch.all((guided > -torch.inf).any(-1))


def assert_unguided_rows_keep_their_bits(
    runtime: GuidanceRuntime, logits: torch.Tensor, prompts: Sequence[list[int]], guidance: dict[str, Any]
) -> None:
    """Rows without guidance are not touched, wherever they lie in the batch."""
    guidances = [guidance if n % 2 else None for n in range(len(prompts))]
    guided = step(runtime, logits, prompts, guidances)
    for n, wanted in enumerate(guidances):
        assert torch.equal(guided[n], logits[n]) == (wanted is None)


def assert_batched_equals_single(
    runtime: GuidanceRuntime, logits: torch.Tensor, prompts: Sequence[list[int]], guidances: Guidances
) -> None:
    """A row's result does not depend on its neighbours."""
    together = step(runtime, logits, prompts, guidances)
    for n, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True)):
        alone = step(runtime, logits[n : n + 1], [prompt], [guidance])
        _assert_close(together[n : n + 1], alone)


def assert_equals_reference(
    runtime: GuidanceRuntime,
    logits: torch.Tensor,
    prompts: Sequence[list[int]],
    guidances: Guidances,
    reference: Callable[[torch.Tensor, list[int], dict[str, Any]], torch.Tensor],
) -> None:
    """The guided distribution is the reference's, log-probability by log-probability."""
    guided = step(runtime, logits, prompts, guidances)
    for n, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True)):
        if guidance is not None:
            expected = reference(logits[n], prompt, guidance)
            _assert_close(guided[n].double().log_softmax(-1), expected)


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32's rounding in sums of a few hundred terms, which grows with the largest of them."""
    largest = float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(1.0, largest))
