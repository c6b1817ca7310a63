"""A head in training and the plain head that is made of it."""

import random

import pytest
import torch

from steersman.guidance.heads import HeadShape
from steersman.training.heads.network import TrainedHead


def draw_head(rng: random.Random, *, embedding: bool, value: bool, dropout: float = 0.0) -> TrainedHead:
    """All weights random, so that no output is 0."""
    shape = HeadShape(hidden_size=rng.choice([6, 17]), width=12, rank=5, vocabulary=40)
    moments = torch.randn(shape.hidden_size), torch.rand(shape.hidden_size) + 0.1
    rows = 3 * torch.randn(40, 9) + 2 if embedding else None
    head = TrainedHead(shape, moments, dropout=dropout, embedding=rows, value=value)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head.eval()


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("value", [False, True])
def test_the_plain_head_has_the_same_outputs_in_the_units_of_the_data(
    rng: random.Random, embedding: bool, value: bool
) -> None:
    head = draw_head(rng, embedding=embedding, value=value)
    hidden = torch.randn(7, head.inner.in_features).half() * 4
    tokens = torch.randint(40, (7, 3))
    features = head.features(hidden)
    every = head.every(features)
    torch.testing.assert_close(head.at(features, tokens), every.gather(1, tokens), atol=1e-4, rtol=1e-4)
    scale, shift = rng.uniform(0.1, 5), rng.uniform(-3, 3)
    plain = head.fold(scale, shift)
    assert plain.shape.rank == 5 + value
    tolerance = 2e-3 * every.std().item() * scale
    torch.testing.assert_close(plain(hidden), scale * every + shift, atol=tolerance, rtol=2e-3)
    assert torch.equal(plain.tokens, plain.tokens.half().float())


def test_what_is_alike_for_all_tokens_is_the_value_s(rng: random.Random) -> None:
    head = draw_head(rng, embedding=False, value=True)
    hidden = torch.randn(3, head.inner.in_features)
    features = head.features(hidden)
    with torch.no_grad():
        head.outer.bias[-1] += 2
    torch.testing.assert_close(head.every(head.features(hidden)), head.every(features) + 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_head_begins_without_any_effect_and_all_of_it_learns(rng: random.Random, embedding: bool) -> None:
    rows = torch.randn(40, 9) if embedding else None
    shape = HeadShape(6, 12, 5, 40)
    head = TrainedHead(shape, (torch.zeros(6), torch.ones(6)), embedding=rows, value=True)
    hidden, tokens = torch.randn(20, 6), torch.randint(40, (20, 1))
    assert head.every(head.features(hidden)).abs().max() == 0
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (head.at(head.features(hidden), tokens) - 1).square().mean().backward()
        optimizer.step()
    for name, parameter in head.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_token_that_no_row_holds_keeps_the_value_of_the_prefix_alone(rng: random.Random) -> None:
    """What it would get otherwise is noise that grows with training, and that guidance would find."""
    head = TrainedHead(HeadShape(6, 12, 5, 40), (torch.zeros(6), torch.ones(6)), value=True)
    hidden, tokens = torch.randn(50, 6), torch.randint(30, (50, 1))
    optimizer = torch.optim.AdamW(head.parameters(), 0.05, weight_decay=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        (head.at(head.features(hidden), tokens) - hidden[:, :1] * tokens).square().mean().backward()
        optimizer.step()
    features = head.features(torch.randn(9, 6))
    every = head.every(features)
    assert torch.equal(every[:, 30:], features[:, -1:].expand(-1, 10))
    assert (every[:, :30] - features[:, -1:]).abs().max() > 0.5


def test_dropout_is_of_training_alone(rng: random.Random) -> None:
    head = draw_head(rng, embedding=False, value=False, dropout=0.5)
    hidden = torch.randn(4, head.inner.in_features)
    assert torch.equal(head.features(hidden), head.features(hidden))
    head.train()
    assert not torch.equal(head.features(hidden), head.features(hidden))
