"""Models come and go while the server answers requests: nobody else notices."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ADMIN_KEY
from tests.server.polling import assert_no_block_stays_in_use, wait_until
from tests.support.server import Server
from tests.support.tiny import END, VOCABULARY, save_reward

STEERED: dict[str, Any] = {"method": "pargs", "reward_model": "first", "beta": 1.5}
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


class Admin:
    """The admin routes of a server."""

    def __init__(self, server: Server) -> None:
        self.url = f"{server.url}/v1/admin/models"

    def post(self, what: str, **body: Any) -> httpx.Response:
        """Loads or unloads."""
        return httpx.post(f"{self.url}/{what}", json=body, headers=HEADERS, timeout=300)

    def load(self, name: str, path: str, kind: str = "reward_model", **fields: Any) -> dict[str, Any]:
        """Loads; fails on any status but 200."""
        answer = self.post("load", kind=kind, name=name, path=path, **fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def unload(self, name: str) -> None:
        """Unloads; fails on any status but 200."""
        answer = self.post("unload", name=name)
        assert answer.status_code == 200, answer.text

    def listed(self) -> dict[str, dict[str, Any]]:
        """What is there, by name."""
        body = httpx.get(self.url, headers=HEADERS, timeout=60).json()
        return {model["name"]: model for model in body["data"]}

    def state(self, name: str) -> str | None:
        """How far a model is, if it is known."""
        return self.listed().get(name, {}).get("state")


@pytest.fixture
def admin(server: Server) -> Iterator[Admin]:
    """Leaves the server as it was."""
    admin = Admin(server)
    before = {name for name, model in admin.listed().items() if model["state"] == "ready"}
    yield admin
    assert {name for name, model in admin.listed().items() if model["state"] != "failed"} == before
    assert_no_block_stays_in_use(server)


def test_every_model_is_listed_with_its_kind_state_and_presets(server: Server, admin: Admin, models: Path) -> None:
    listed = admin.listed()
    assert {name: listed[name]["kind"] for name in ("first", "text", "expert", "adapter")} == {
        **{"first": "reward_model", "text": "reward_model"},
        **{"expert": "policy", "adapter": "policy"},
    }
    first = listed["first"]
    assert (first["state"], first["path"], first["requests"]) == ("ready", str(models / "first"), 0)
    assert first["presets"] == ["steered", "picked"]
    shown = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()["reward_models"]
    changing = ("cache_blocks_in_use", "adapter_drift")
    assert first["model"] == {k: v for k, v in shown[0].items() if k not in changing}


def test_a_reward_model_is_loaded_used_unloaded_and_loaded_again_under_traffic(
    server: Server, admin: Admin, rng: random.Random
) -> None:
    prompts = [[rng.randrange(2, VOCABULARY - 8) for _ in range(rng.randint(5, 60))] for _ in range(4)]
    by_first = [_answer(server, prompt, STEERED) for prompt in prompts]
    with _traffic(server, rng) as traffic:
        assert _refusal(server, prompts[0], "later") == "no reward model 'later' is loaded"
        for cache_gib in (0.01, 0.005):
            loaded = admin.load("later", "first", cache_gib=cache_gib)
            assert 0 < 1 - loaded["model"]["cache_blocks"] * 16 * 512 / (cache_gib * 2**30) < 0.1
            assert _names(server)["reward_models"].count("later") == 1
            assert _names(server)["cache_tokens"]["later"] == loaded["model"]["cache_blocks"] * 16
            later = {**STEERED, "reward_model": "later"}
            assert [_answer(server, prompt, later) for prompt in prompts] == by_first
            assert _rewards(server, "later", prompts) == pytest.approx(_rewards(server, "first", prompts), abs=1e-5)
            _unload_while_it_is_used(server, admin, prompts[0], later)
            assert "later" not in str(_names(server))
            assert _refusal(server, prompts[0], "later") == "no reward model 'later' is loaded"
        assert traffic.rounds > 0
    assert traffic.errors == []
    assert [_answer(server, prompt, STEERED) for prompt in prompts] == by_first


def test_a_policy_is_loaded_while_nobody_waits_for_it(server: Server, admin: Admin, rng: random.Random) -> None:
    begun = admin.post("load", kind="policy", name="twin", path="expert", wait=False)
    assert (begun.status_code, begun.json()) == (202, {"name": "twin", "state": "loading"})
    assert admin.state("twin") == "loading"
    for fields in ({"name": "twin"}, {"name": "other-twin"}):
        answer = admin.post("load", kind="policy", path="expert", **fields)
        _assert_refused(answer, 409, "name" if fields["name"] == "twin" else None, "'twin'", "load")
    _assert_refused(admin.post("unload", name="twin"), 409, "name", "'twin' is loading")
    wait_until(lambda: admin.state("twin") == "ready", "the policy is loaded", limit_s=200)
    prompt = [rng.randrange(2, VOCABULARY - 8) for _ in range(30)]
    mixed: dict[str, Any] = {"method": "mixed", "mix": 0.6}
    by_twin = _answer(server, prompt, {**mixed, "policy": "twin"})
    assert by_twin == _answer(server, prompt, {**mixed, "policy": "expert"})
    admin.unload("twin")


REFUSED = {
    "a name that is taken": ({"name": "first", "path": "second"}, 409, "name", "'first' names a reward model"),
    "a policy's name": ({"name": "expert", "path": "second"}, 409, "name", "'expert' names a policy"),
    "no name": ({"name": "a b", "path": "second"}, 400, "name", "letters, digits"),
    "the base's name": ({"name": "base", "path": "second"}, 400, "name", "the base model's own name"),
    "a missing folder": ({"name": "x", "path": "absent"}, 400, "path", "absent does not exist"),
    "a folder outside": ({"name": "x", "path": "../.."}, 400, "path", "lies outside of"),
    "another place": ({"name": "x", "path": "/etc"}, 400, "path", "lies outside of"),
    "a repository": ({"name": "x", "path": "someone/model"}, 400, "path", "has to be downloaded first"),
    "no checkpoint": ({"name": "x", "path": "."}, 400, "path", "config.json is missing"),
    "pickled weights": ({"name": "x", "path": "pickles"}, 400, "path", "save_pretrained"),
    "no kind": ({"name": "x", "path": "first", "kind": "base"}, 400, None, "'reward_model' or 'policy'"),
    "no cache": ({"name": "x", "path": "first", "cache_gib": 0}, 400, None, "cache_gib"),
    "an unknown field": ({"name": "x", "path": "first", "speed": 3}, 400, None, "speed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_at_once(admin: Admin, models: Path, case: str) -> None:
    (models / "pickles").mkdir(exist_ok=True)
    for name, content in (("config.json", "{}"), ("pytorch_model.bin", "")):
        (models / "pickles" / name).write_text(content)
    body, status, field, words = REFUSED[case]
    answer = admin.post("load", **{"kind": "reward_model", **body})
    assert words in _assert_refused(answer, status, field)


def test_a_checkpoint_that_would_be_served_wrongly_leaves_nothing_behind(
    server: Server, admin: Admin, models: Path
) -> None:
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 16}
    save_reward(models / "looks-away", seed=7, kind="GPTNeo", num_layers=2, num_heads=2, **local)
    names = _names(server)
    answer = admin.post("load", kind="reward_model", name="strange", path="looks-away")
    message = _assert_refused(answer, 400, "path", "'strange'", "gpt_neo", "cannot be read token by token")
    assert message == f"path: {admin.listed()['strange']['error']}"
    assert admin.state("strange") == "failed"
    assert _names(server) == names


def test_what_cannot_be_unloaded_is_refused(admin: Admin) -> None:
    _assert_refused(admin.post("unload", name="absent"), 404, "name", "'absent'", "expert, first")
    _assert_refused(admin.post("unload", name="first"), 409, "name", "the preset 'steered', 'picked'")
    _assert_refused(admin.post("unload"), 400, None, "name")


class Traffic:
    """Streams that repeat the same requests, and what went wrong with them."""

    def __init__(self) -> None:
        self.rounds = 0
        self.errors: list[str] = []
        self.stop = threading.Event()


@contextmanager
def _traffic(server: Server, rng: random.Random) -> Iterator[Traffic]:
    """Streams without a break; each asks for the same answer again and again."""
    traffic = Traffic()
    guidances: list[dict[str, Any] | None] = [None, STEERED, {"method": "mixed", "policy": "other", "mix": 0.7}]
    bodies: list[dict[str, Any]] = [
        {
            **{"model": "base", "prompt": [rng.randrange(2, VOCABULARY - 8) for _ in range(20)], "max_tokens": 40},
            **{"seed": rng.randrange(2**31), "logit_bias": {str(END): -100}},
            "extra_body": {} if guidance is None else {"guidance": guidance},
        }
        for guidance in guidances
    ]

    async def repeat(client: openai.AsyncOpenAI, body: dict[str, Any]) -> None:
        first = None
        while not traffic.stop.is_set():
            try:
                chunks = [chunk async for chunk in await client.completions.create(**body, stream=True)]
            except openai.APIError as error:
                traffic.errors.append(str(error))
                return
            text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
            first = first or text
            if text != first:
                traffic.errors.append(f"{text!r} is not {first!r}")
            traffic.rounds += 1

    async def run() -> None:
        async with server.async_client as client:
            await asyncio.gather(*(repeat(client, body) for body in bodies))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield traffic
    finally:
        traffic.stop.set()
        thread.join()


def _unload_while_it_is_used(server: Server, admin: Admin, prompt: list[int], guidance: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"max_tokens": 150, "logit_bias": {str(END): -100}, "stream": True}
    stream = server.client.completions.create(model="base", prompt=prompt, **fields, extra_body={"guidance": guidance})
    next(iter(stream))
    assert admin.post("unload", name="later", wait=False).status_code == 202
    assert _refusal(server, prompt, "later") == "no reward model 'later' is loaded"
    report = [choice.guidance for chunk in stream for choice in chunk.choices if choice.finish_reason]  # type: ignore[attr-defined]
    assert report[0]["tokens"] == 150
    assert report[0]["rewards"]["later"] is not None
    wait_until(lambda: admin.state("later") is None, "the model is unloaded")


def _answer(server: Server, prompt: list[int], guidance: dict[str, Any]) -> str:
    return str(server.complete(prompt, guidance, max_tokens=12, seed=7)["choices"][0]["text"])


def _rewards(server: Server, model: str, prompts: list[list[int]]) -> list[float]:
    scored = server.post("/v1/rewards", {"model": model, "prompt": prompts[0], "responses": prompts[1:]}).json()
    return [entry["reward"] for entry in scored["data"]]


def _names(server: Server) -> dict[str, Any]:
    """What `GET /v1/guidance` says is loaded."""
    body = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()
    kinds = {kind: [model["name"] for model in body[kind]] for kind in ("reward_models", "policies")}
    return {**kinds, "cache_tokens": body["limits"]["cache_tokens"]}


def _refusal(server: Server, prompt: list[int], reward_model: str) -> str:
    """Why a request that names the model, and one that scores with it, are refused."""
    guided = server.post("/v1/completions", {"model": "base", "prompt": prompt, "guidance": STEERED | {
        "reward_model": reward_model
    }})  # fmt: skip
    scored = server.post("/v1/rewards", {"model": reward_model, "prompt": prompt, "responses": ["a"]})
    reasons = {_assert_refused(answer, 400, field).split(": ", 1)[1].split(";")[0] for answer, field in (
        (guided, "guidance.reward_model"), (scored, "model")
    )}  # fmt: skip
    assert len(reasons) == 1
    return reasons.pop()


def _assert_refused(answer: httpx.Response, status: int, field: str | None, *words: str) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    if field is not None:
        assert error["param"] == field
        assert error["message"].startswith(f"{field}: ")
    assert all(word in error["message"] for word in words), error["message"]
    return str(error["message"])
