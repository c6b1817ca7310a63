"""Heads on a server: they score texts as a float64 reference does, cost no tokens and no cache, and come and go."""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from steersman.guidance.head_files import REWARD
from steersman.server.heads import run_together
from tests.server.test_admin import Admin
from tests.support.metrics import growth, read_metrics, total
from tests.support.oracle import Oracle, head_rewards
from tests.support.random_input import random_prompts
from tests.support.server import Server
from tests.support.tiny import VOCABULARY, save_random_head

BY_HEAD: dict[str, Any] = {"method": "pargs", "reward_model": "atop", "beta": 1.2, "top_k": 6}
Value = Callable[[list[int], list[int]], float]


@pytest.fixture(scope="module")
def value(models: Path) -> Value:
    """The reward head's value of an answer behind a prompt, in float64."""
    rewards = head_rewards(models / "atop", models / "base")
    return lambda prompt, response: float(rewards([[*prompt, *response]]))


@pytest.fixture
def admin(server: Server) -> Iterator[Admin]:
    """Leaves the server as it was."""
    admin = Admin(server)
    before = {name for name, model in admin.listed().items() if model["state"] == "ready"}
    yield admin
    assert {name for name, model in admin.listed().items() if model["state"] != "failed"} == before


def _close(expected: float | list[float]) -> Any:
    return pytest.approx(expected, abs=1e-5, rel=1e-5)


def _score(server: Server, prompt: list[int], responses: list[list[int]], **fields: Any) -> dict[str, Any]:
    answer = server.post("/v1/rewards", {"model": "atop", "prompt": prompt, "responses": responses, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_every_prefix_has_the_reward_of_the_float64_reference(
    interface: Server, value: Value, rng: random.Random
) -> None:
    """Also behind a prompt that is read in pieces, and one that the prefix cache holds."""
    for longest in (30, 150):
        prompt, *responses = random_prompts(rng, 3, shortest=longest // 2, longest=longest)
        responses = [response[:12] for response in responses]
        for _ in range(2):
            scored = _score(interface, prompt, responses, prefixes=True)
            for entry, response in zip(scored["data"], responses, strict=True):
                expected = [value(prompt, response[: n + 1]) for n in range(len(response))]
                assert entry["prefix_rewards"] == _close(expected)
                assert entry["reward"] == entry["prefix_rewards"][-1]
            ends = [entry["reward"] for entry in _score(interface, prompt, responses)["data"]]
            assert ends == _close([value(prompt, response) for response in responses])


def test_an_answers_report_has_the_reward_that_its_text_is_scored_with(
    interface: Server, value: Value, rng: random.Random
) -> None:
    for longest in (20, 120):
        prompt = random_prompts(rng, 1, shortest=longest - 5, longest=longest)[0]
        body = interface.complete(prompt, BY_HEAD, max_tokens=9, temperature=0, return_token_ids=True)
        choice = body["choices"][0]
        report = choice["guidance"]
        (entry,) = _score(interface, prompt, [choice["token_ids"]])["data"]
        assert report["rewards"]["atop"] == _close(entry["reward"])
        assert entry["reward"] == _close(value(prompt, choice["token_ids"]))
        assert (report["reward_model_tokens"], report["policy_tokens"]) == (0, 0)
        assert report["guided_tokens"] == report["tokens"] == len(choice["token_ids"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"responses": [[5] * 260]}, "responses.0: with the prompt has 262 tokens"),
        ({"prompt": [5] * 250, "responses": [[7] * 7]}, "reads at most 256"),
        ({"prompt": []}, "prompt: "),
        ({"responses": [[VOCABULARY]]}, "outside of 0 to"),
    ],
)
@pytest.mark.parametrize("model", ["atop", "every"])
def test_a_text_that_cannot_be_read_is_refused(server: Server, change: dict[str, Any], says: str, model: str) -> None:
    if model == "every" and "reads at most" in says:
        change, says = {"prompt": [5] * 500, "responses": [[7] * 13]}, "reads at most 512"
    if model == "every" and "262" in says:
        change, says = {"responses": [[5] * 520]}, "responses.0: with the prompt has 522 tokens"
    answer = server.post("/v1/rewards", {"model": model, "prompt": [5, 6], "responses": [[7, 8]], **change})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_a_text_as_long_as_the_base_reads_is_scored(server: Server, value: Value, rng: random.Random) -> None:
    prompt = [rng.randrange(2, VOCABULARY - 8) for _ in range(200)]
    response = [rng.randrange(2, VOCABULARY - 8) for _ in range(56)]
    (entry,) = _score(server, prompt, [response], prefixes=True)["data"]
    assert entry["reward"] == _close(value(prompt, response))
    assert entry["prefix_rewards"][0] == _close(value(prompt, response[:1]))


@pytest.mark.parametrize("guidance", [
    {"method": "best_of_n", "reward_model": "atop", "n": 4, "trace": True},
    {"method": "blockwise", "reward_model": "atop", "n": 3, "block": 4, "trace": True},
], ids=lambda g: g["method"])  # fmt: skip
def test_a_head_picks_the_best_of_samples(
    server: Server, models: Path, value: Value, rng: random.Random, guidance: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    # Text of half characters can be written in more than one way.
    whole = [token for token in range(1, VOCABULARY) if tokenizer.decode([token]).isascii()]
    prompt = rng.choices(whole, k=rng.randint(4, 30))
    fields = {"max_tokens": 10, "allowed_token_ids": whole, "return_token_ids": True, "seed": rng.randrange(1000)}
    choice = server.complete(prompt, guidance, **fields)["choices"][0]
    place = 0
    for step in choice["guidance"]["trace"]:
        scores = [sample["reward"] for sample in step["samples"]]
        assert step["chosen"] == max(range(len(scores)), key=scores.__getitem__)
        place += step["samples"][step["chosen"]]["tokens"]
        assert scores[step["chosen"]] == _close(value(prompt, choice["token_ids"][:place]))
    assert place == len(choice["token_ids"])
    assert choice["guidance"]["rewards"]["atop"] == _close(value(prompt, choice["token_ids"]))
    assert choice["guidance"]["reward_model_tokens"] == 0


@pytest.mark.parametrize(
    "guidance",
    [
        {**BY_HEAD, "trace": True},
        {**BY_HEAD, "top_k": None, "trace": True},
        {"method": "mixed", "policy": "tilted", "mix": 0.7, "trace": True},
        {"method": "length_control", "policy": "tilted", "length": 3, "trace": True},
        {**BY_HEAD, "policies": {"base": 0.4, "tilted": 0.6}, "gate": {"entropy_above": 2.0}, "trace": True},
    ],
    ids=["candidates", "every token", "mixed", "length control", "both"],
)
def test_a_trace_shows_the_scores_of_the_reference(
    server: Server, oracle: Oracle, rng: random.Random, guidance: dict[str, Any]
) -> None:
    prompt = random_prompts(rng, 1, shortest=4, longest=80)[0]
    body = server.complete(prompt, guidance, max_tokens=5, temperature=0, ignore_eos=True, return_token_ids=True)
    choice = body["choices"][0]
    asked = {name: part for name, part in guidance.items() if name != "trace"}
    steps = oracle.replay(prompt, choice["token_ids"], asked)
    for shown, step in zip(choice["guidance"]["trace"], steps, strict=True):
        assert (shown["source"] != "base") == step.guided
        for candidate in shown["candidates"]:
            token = candidate["token_id"]
            assert candidate["score"] == pytest.approx(float(step.logprobs[token]), abs=3e-4)
            if "reward_model" in guidance:
                own = step.rewards["atop"][step.candidates.index(token)]
                assert candidate["reward"] == _close(float(own))


def test_what_a_head_needs_is_shown_and_counted(server: Server, rng: random.Random) -> None:
    shown = server.get("/v1/guidance").json()
    for kind, name, told in (("reward_models", "atop", "head"), ("policies", "tilted", "policy_head")):
        (model,) = [model for model in shown[kind] if model["name"] == name]
        assert (model["kind"], model["cache_blocks"], model["window"]) == (told, 0, 256)
        assert model["drift"] < 1e-4, "the very base that it was trained on"
        assert name not in shown["limits"]["cache_tokens"]
    before = read_metrics(server)
    for guidance in (BY_HEAD, {"method": "mixed", "policy": "tilted", "mix": 0.5}):
        server.complete(random_prompts(rng, 1)[0], guidance, max_tokens=4, temperature=0)
    grown = growth(before, read_metrics(server))
    assert total(grown, "steersman_auxiliary_tokens_total") == 0
    assert total(grown, "steersman_guided_tokens_total") > 0


def test_a_head_comes_and_goes_while_the_server_runs(
    server: Server, admin: Admin, models: Path, rng: random.Random
) -> None:
    prompt = random_prompts(rng, 1, shortest=10)[0]
    asked = {"max_tokens": 10, "temperature": 0, "return_token_ids": True}
    for kind, path, guidance in (
        ("reward_model", "atop", BY_HEAD | {"reward_model": "later"}),
        ("policy", "tilted", {"method": "mixed", "policy": "later", "mix": 0.8}),
    ):
        loaded = admin.load("later", path, kind=kind)
        assert (loaded["state"], loaded["model"]["cache_blocks"]) == ("ready", 0)
        assert loaded["model"]["drift"] < 1e-4
        known = {**guidance, **{"reward_model" if kind == "reward_model" else "policy": path}}
        by_later, by_known = (server.complete(prompt, g, **asked)["choices"][0] for g in (guidance, known))
        assert by_later["token_ids"] == by_known["token_ids"]
        admin.unload("later")
        refused = server.post("/v1/completions", {"model": "base", "prompt": prompt, "guidance": guidance})
        assert refused.status_code == 400
        assert "'later' is loaded" in refused.json()["error"]["message"]


def test_a_head_of_another_base_leaves_nothing_behind(
    server: Server, admin: Admin, models: Path, value: Value, rng: random.Random
) -> None:
    save_random_head(models / "stray", models / "expert", REWARD, seed=21)
    before = server.get("/v1/guidance").json()
    answer = admin.post("load", kind="reward_model", name="astray", path="stray")
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith("path: reward model 'astray': on this base model its outputs are off by ")
    assert message == f"path: {admin.listed()['astray']['error']}"
    assert admin.state("astray") == "failed"
    after = server.get("/v1/guidance").json()
    for kind in ("reward_models", "policies", "limits"):
        assert after[kind] == before[kind]
    answer = admin.post("load", kind="policy", name="astray", path="atop")
    assert answer.status_code == 400
    assert "load it with --reward-model" in answer.json()["error"]["message"]
    # The name is free in the workers too, and what is loaded under it now is what answers.
    admin.load("astray", "atop")
    prompt, response = random_prompts(rng, 2, longest=20)
    (entry,) = server.post("/v1/rewards", {"model": "astray", "prompt": prompt, "responses": [response]}).json()["data"]
    assert entry["reward"] == _close(value(prompt, response))
    admin.unload("astray")


def test_work_that_runs_together_keeps_its_order_and_ends_with_the_first_failure() -> None:
    ended: list[int] = []

    async def one(place: int, fails: bool = False) -> int:
        try:
            await asyncio.sleep(0.001 * (3 - place))
            if fails:
                raise ValueError("text")
            return place
        finally:
            ended.append(place)

    async def stuck(place: int) -> int:
        try:
            return int(await asyncio.Event().wait())
        finally:
            ended.append(place)

    assert asyncio.run(run_together(one(place) for place in range(3))) == [0, 1, 2]
    ended.clear()
    with pytest.raises(ValueError, match="text"):
        asyncio.run(asyncio.wait_for(run_together([stuck(0), one(1, True), stuck(2)]), 10))
    assert sorted(ended) == [0, 1, 2], "nothing is left running"
