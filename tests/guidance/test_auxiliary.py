"""One causal model over its cache: tokens are read once, packed with others', and give what a full forward gives."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from steersman.guidance import auxiliary
from steersman.guidance.auxiliary import CausalModel, Prefix, Unscorable
from steersman.guidance.cache import BLOCK_SIZE, CacheFull
from steersman.guidance.checkpoints import ModelRefused
from tests.support.tiny import COMMON, VOCABULARY, randomise

NEAR = {"rtol": 1e-4, "atol": 1e-4}
BYTES_PER_TOKEN = 2 * 2 * 32 * 4
"""Layers · (key and value) · width · float32."""


def make(rng: random.Random, blocks: int = 100, max_rows: int = 8) -> CausalModel:
    """A model with so many blocks beside the one of padding, scratch among them."""
    model: Any = randomise(AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)), rng.randrange(2**31), spread=0.12)
    cache_bytes = (blocks + 1) * BLOCK_SIZE * BYTES_PER_TOKEN
    return CausalModel(model, "policy 'p'", cache_bytes, max_rows, model.lm_head)


def full(model: CausalModel, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token by a forward of transformers' own attention."""
    plain = LlamaForCausalLM(model.model.config)
    plain.load_state_dict(model.model.state_dict())
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        return plain.eval()(input_ids=torch.tensor([tokens])).logits[0, -1]


def draw(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(2, VOCABULARY) for _ in range(length)]


@contextmanager
def counting(model: CausalModel) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what is embedded."""
    shapes: list[tuple[int, ...]] = []
    handle = model.body.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    try:
        yield shapes
    finally:
        handle.remove()


@torch.inference_mode()
def test_what_requests_share_is_read_once_and_the_rest_packed(rng: random.Random) -> None:
    model, shared = make(rng), draw(rng, 2 * BLOCK_SIZE)
    texts = [[*shared, *draw(rng, n)] for n in (5, 9, 1)] + [draw(rng, 12)]
    prefixes = [Prefix(n, text, []) for n, text in enumerate(texts)]
    with counting(model) as shapes:
        outputs, read = model.read(prefixes)
    for output, text in zip(outputs, texts, strict=True):
        torch.testing.assert_close(output, full(model, text), **NEAR)
    assert read == [len(shared) + 4, 8, 0, 11]
    assert len(shapes) == 3, "one forward for the first texts, one for those that share with them, and the step"
    assert shapes[-1] == (4, 1)


@torch.inference_mode()
def test_a_text_grows_token_by_token_and_what_was_skipped_is_caught_up(rng: random.Random) -> None:
    model, prompt = make(rng), draw(rng, 20)
    model.read([Prefix("a", prompt, [])])
    output: list[int] = []
    for skipped in (0, 0, 3):
        output += draw(rng, skipped + 1)
        outputs, read = model.read([Prefix("a", prompt, output)])
        torch.testing.assert_close(outputs[0], full(model, [*prompt, *output]), **NEAR)
        assert read == [skipped]
    assert model.covers("a", len(prompt) + len(output))
    assert not model.covers("a", len(prompt) + len(output) + 1)
    assert not model.covers("b", 0)


@torch.inference_mode()
@pytest.mark.parametrize(("k", "branches"), [(1, 1), (5, 1), (4, 2), (BLOCK_SIZE + 2, 1), (BLOCK_SIZE, 2)])
def test_candidates_see_their_own_branch_whatever_the_scratch_holds_at_once(
    rng: random.Random, k: int, branches: int
) -> None:
    model = make(rng, blocks=60, max_rows=3)
    texts = [draw(rng, rng.randint(1, 40)) for _ in range(7)]
    prefixes = [Prefix(n, text, []) for n, text in enumerate(texts)]
    model.catch_up(prefixes)
    candidates = torch.tensor([draw(rng, k * branches) for _ in texts])
    tokens = torch.cat((model.last_tokens(prefixes), candidates), dim=1)
    outputs = model.step(list(range(7)), [len(text) for text in texts], tokens, branches)
    assert outputs.shape == (7, k, VOCABULARY)
    for n in rng.sample(range(7), 3):
        candidate = rng.randrange(k)
        branch = candidates[n, candidate::k].tolist()
        torch.testing.assert_close(outputs[n, candidate], full(model, [*texts[n], *branch]), **NEAR)


def test_a_step_has_scratch_for_as_many_rows_as_it_may_have_or_a_quarter_of_the_cache(rng: random.Random) -> None:
    for blocks, max_rows, scratch in ((100, 8, 8), (20, 8, 5), (4, 8, 1)):
        model = make(rng, blocks, max_rows)
        assert (len(model.cache.scratch), model.cache.num_blocks) == (scratch, blocks - scratch)
        assert model.describe()["cache_bytes"] == (blocks + 1) * BLOCK_SIZE * BYTES_PER_TOKEN
    with pytest.raises(ModelRefused, match="is too small at 512 bytes a token; give it more with --guidance-cache"):
        make(rng, blocks=3)


@torch.inference_mode()
def test_a_prefill_is_split_where_its_padding_would_be_too_large(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auxiliary, "_PREFILL_TOKENS", 60)
    model, lengths = make(rng), [30, 3, 70, 5, 29, 15]
    texts = [draw(rng, length) for length in lengths]
    with counting(model) as shapes:
        done = model.prefill(list(enumerate(texts)))
    assert done == dict(enumerate(lengths))
    assert sorted(shapes) == [(1, 70), (2, 30), (3, 15)]
    for n, text in enumerate(texts):
        outputs, read = model.read([Prefix(n, text, [7])])
        assert read == [0]
        torch.testing.assert_close(outputs[0], full(model, [*text, 7]), **NEAR)


@torch.inference_mode()
def test_rows_without_room_fail_alone_and_alone_with_a_reason(rng: random.Random) -> None:
    model = make(rng, blocks=8, max_rows=1)
    wanted = [(n, draw(rng, 3 * BLOCK_SIZE)) for n in range(3)]
    done = model.prefill(wanted)
    assert [done[0], done[1]] == [3 * BLOCK_SIZE] * 2
    assert isinstance(done[2], CacheFull)
    assert not model.covers(2, 0)
    prefixes = [Prefix(n, [*tokens, 5], []) for n, tokens in wanted]
    with pytest.raises(CacheFull):
        model.catch_up(prefixes[1:])
    with pytest.raises(Unscorable, match=r"policy 'p': .* cache blocks needed"):
        model.catch_up(prefixes[2:])
    model.release(0)
    assert model.catch_up(prefixes[2:]) == [3 * BLOCK_SIZE]
    model.release(1)
    model.release(2)
    model.release("nobody")
    assert model.describe()["cache_blocks_in_use"] == 0


@torch.inference_mode()
def test_blocks_are_found_again_by_requests_that_begin_alike_unless_theirs_failed(rng: random.Random) -> None:
    for failed, reused in ((False, 2 * BLOCK_SIZE), (True, BLOCK_SIZE)):
        model, prompt = make(rng), draw(rng, BLOCK_SIZE + 1)
        answer = draw(rng, BLOCK_SIZE)
        model.read([Prefix("a", prompt, [])])
        for n in range(len(answer)):
            model.read([Prefix("a", prompt, answer[: n + 1])])
        model.release("a", [*prompt, *answer], failed)
        _, read = model.read([Prefix("b", [*prompt, *answer], [])])
        assert read == [len(prompt) + len(answer) - 1 - reused]


@torch.inference_mode()
def test_a_text_is_read_at_once_and_leaves_nothing(rng: random.Random) -> None:
    model, text = make(rng), draw(rng, 40)
    hidden = model.read_text(text)
    for n in (1, 17, 40):
        torch.testing.assert_close(model.head(hidden[n - 1]), full(model, text[:n]), **NEAR)
    assert model.describe()["cache_blocks_in_use"] == 0
    assert model.cache.admit(text).length == 0
    with pytest.raises(Unscorable, match=f"reads the token ids 0 to {VOCABULARY - 1}, the text holds {VOCABULARY}"):
        model.read_text([*text, VOCABULARY])


@torch.inference_mode()
def test_tokens_that_are_not_read_again_are_not_looked_at(rng: random.Random) -> None:
    model, prompt = make(rng), draw(rng, 20)
    model.read([Prefix("a", prompt, [])])
    unknown = [-1, *prompt[1:]]
    assert model.prefill([("a", [*unknown, 7])]) == {"a": 1}
    with pytest.raises(Unscorable, match="the text holds -1"):
        model.prefill([("b", unknown)])
    with pytest.raises(Unscorable, match="the text holds -1"):
        model.last_tokens([Prefix("a", prompt, [-1])])
    known = torch.tensor([9])
    assert model.last_tokens([Prefix("a", prompt, [-1])], known).tolist() == [[9]]


def test_a_prefix_knows_its_length_its_last_token_and_all_of_them() -> None:
    for prompt, output, last in (([3, 4], [], 4), ([3, 4], [5, 6], 6)):
        prefix = Prefix("a", prompt, output)
        assert (len(prefix), prefix.last, prefix.tokens()) == (len(prompt) + len(output), last, [*prompt, *output])
