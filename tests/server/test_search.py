"""best_of_n and blockwise: the best of what the base samples, by the reward model's own account."""

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.request import TooLong, UnscorableText, parse_guidance
from steersman.server.registry import LoadedModel
from steersman.server.search import Search, _Choice
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.oracle import causal_rewards
from tests.support.server import Server
from tests.support.tiny import VOCABULARY


def test_the_best_of_n_samples_is_returned_and_all_of_them_are_counted(
    server: Server, models: Path, rng: random.Random
) -> None:
    prompt, rewards = _prompt(rng), causal_rewards(models / "first")
    answer = _complete(server, prompt, {"method": "best_of_n", "reward_model": "first", "n": 5, "trace": True})
    choice, report = answer["choices"][0], answer["choices"][0]["guidance"]
    (step,) = report["trace"]
    scores = [sample["reward"] for sample in step["samples"]]
    assert len(scores) == 5
    assert step["chosen"] == max(range(5), key=scores.__getitem__)
    expected = float(rewards([[*prompt, *choice["token_ids"]]])[0])
    assert report["rewards"]["first"] == max(scores) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert choice["text"] == step["samples"][step["chosen"]]["text"]
    generated = sum(sample["tokens"] for sample in step["samples"])
    assert answer["usage"]["completion_tokens"] == report["generated_tokens"] == generated
    assert report["tokens"] == len(choice["token_ids"]) < generated
    # The prompt once; what the samples begin with in common is shared too.
    assert len(prompt) < report["reward_model_tokens"] <= len(prompt) + generated
    assert report["kl"] == pytest.approx(torch.tensor(5.0).log().item() - 0.8, abs=1e-5)
    assert_no_block_stays_in_use(server)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_every_block_is_the_best_of_its_samples(server: Server, models: Path, rng: random.Random, block: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    # Text of half characters can be written in more than one way.
    whole = [token for token in range(1, VOCABULARY) if tokenizer.decode([token]).isascii()]
    prompt, rewards = rng.choices(whole, k=rng.randint(4, 30)), causal_rewards(models / "first")
    guidance = {"method": "blockwise", "reward_model": "first", "n": 3, "block": block, "trace": True}
    answer = _complete(server, prompt, guidance, max_tokens=20, allowed_token_ids=whole)
    choice, report = answer["choices"][0], answer["choices"][0]["guidance"]
    tokens = choice["token_ids"]
    place = 0
    for step in report["trace"]:
        scores = [sample["reward"] for sample in step["samples"]]
        assert step["chosen"] == max(range(3), key=scores.__getitem__)
        place += step["samples"][step["chosen"]]["tokens"]
        expected = float(rewards([[*prompt, *tokens[:place]]])[0])
        assert scores[step["chosen"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert place == len(tokens) == report["tokens"]
    assert len(tokens) == 20 or choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == report["generated_tokens"]
    behind = tokenizer.decode(prompt, skip_special_tokens=True)
    assert choice["text"] == tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(behind) :]


@pytest.mark.parametrize("guidance", [
    {"method": "best_of_n", "reward_model": "second", "n": 3},
    {"method": "blockwise", "reward_model": "second", "n": 3, "block": 4},
], ids=lambda g: g["method"])  # fmt: skip
def test_streams_are_the_whole_answer_piece_by_piece(
    server: Server, rng: random.Random, guidance: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        **{"model": "base", "prompt": _prompt(rng), "max_tokens": 16, "seed": rng.randrange(1000), "logprobs": 1},
        "extra_body": {"guidance": guidance},
    }
    whole = server.client.completions.create(**fields)
    chunks = list(server.client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert sum(len(piece.logprobs.tokens) for piece in pieces if piece.logprobs) == len(
        whole.choices[0].logprobs.tokens  # type: ignore[union-attr, arg-type]
    )
    assert chunks[-1].usage == whole.usage
    streamed, reported = pieces[-1].guidance, whole.choices[0].guidance  # type: ignore[attr-defined]
    # What the first of the two has read is found in the reward model's cache by the second.
    assert streamed.pop("reward_model_tokens") < reported.pop("reward_model_tokens")
    assert streamed.pop("rewards") == pytest.approx(reported.pop("rewards"), rel=1e-4)
    assert streamed == reported
    if guidance["method"] == "blockwise" and len(whole.choices[0].logprobs.tokens) > 4:  # type: ignore[union-attr, arg-type]
        assert len(pieces) > 1, "blocks are sent as they are chosen"


def test_a_stop_string_over_two_blocks_ends_the_answer(server: Server, rng: random.Random) -> None:
    guidance = {"method": "blockwise", "reward_model": "first", "n": 2, "block": 1}
    for _ in range(5):
        fields = {"max_tokens": 20, "seed": rng.randrange(1000)}
        prompt = _prompt(rng)
        text = _complete(server, prompt, guidance, **fields)["choices"][0]["text"]
        if len(text) > 8:
            break
    stop = text[4:7]
    stopped = _complete(server, prompt, guidance, **fields, stop=[stop])["choices"][0]
    assert stopped["text"] == text[: text.index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    included = _complete(server, prompt, guidance, **fields, stop=stop, include_stop_str_in_output=True)
    assert included["choices"][0]["text"] == text[: text.index(stop) + len(stop)]
    streamed = server.client.completions.create(
        model="base",
        prompt=prompt,
        stop=stop,
        stream=True,
        extra_body={"guidance": guidance},
        **fields,  # type: ignore[call-overload]
    )
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == stopped["text"]


def test_best_of_n_keeps_to_a_grammar(server: Server) -> None:
    client: openai.OpenAI = server.client
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "which?"}],
        extra_body={
            "guidance": {"method": "best_of_n", "reward_model": "first", "n": 4},
            "structured_outputs": {"choice": ["kettle", "lamp"]},
        },
    )
    assert answer.choices[0].message.content in ("kettle", "lamp")


def test_a_model_that_cannot_score_fails_its_own_request(server: Server) -> None:
    with pytest.raises(openai.InternalServerError, match="'broken'"):
        server.client.completions.create(
            model="base",
            prompt=[5, 319, 7],
            max_tokens=4,
            extra_body={"guidance": {"method": "best_of_n", "reward_model": "broken", "n": 2}},
        )
    assert_no_block_stays_in_use(server)


class _Unseen:
    """The engine and the answer of a search: texts beyond `limit` tokens cannot be scored."""

    tokens: tuple[int, ...] = ()

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def trim(self, sample: Any) -> Any:
        return sample

    async def score_answers(self, model: Any, prompt: Any, texts: list[list[int]], source: Any) -> Any:
        if (longest := max(map(len, texts))) > self.limit:
            raise UnscorableText("responses", f"the text has {longest}")
        return [float(len(text)) for text in texts], sum(map(len, texts))


def test_samples_that_have_outgrown_the_model_are_left_out_of_the_choice(rng: random.Random) -> None:
    guidance: Any = parse_guidance({"method": "best_of_n", "reward_model": "text", "n": 4})
    search = Search(guidance, LoadedModel("text", "text", 64), [5], length_field="max_completion_tokens")
    lengths = rng.sample(range(1, 20), 4)
    samples: Any = [SimpleNamespace(token_ids=[7] * length, text="") for length in lengths]
    engine: Any = _Unseen(sorted(lengths)[1])
    choice = _Choice(engine, search)
    best = asyncio.run(choice.make(engine, samples))
    assert len(best.token_ids) == engine.limit
    report = choice.report(engine.limit)
    assert report["unreadable_samples"] == 2
    assert report["reward_model_tokens"] == sum(sorted(lengths)[:2])
    engine.limit = 0
    with pytest.raises(TooLong, match=r"none of the samples .* the text has \d+; ask for fewer tokens") as refusal:
        asyncio.run(choice.make(engine, samples))
    assert refusal.value.field == "max_completion_tokens"


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(2, 300) for _ in range(rng.randint(4, 30))]


def _complete(server: Server, prompt: list[int], guidance: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return server.complete(prompt, guidance, **{"max_tokens": 12, "return_token_ids": True, **fields})
