"""Servers that several rooms of tests share: starting one takes half a minute."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from xdist.scheduler.loadscope import LoadScopeScheduling

from steersman.guidance.head_files import POLICY, REWARD
from tests.support import interpreted_triton  # noqa: F401
from tests.support.tiny import (
    VOCABULARY,
    build_tokenizer,
    randomise,
    save_adapter,
    save_base,
    save_random_head,
    save_reward,
    save_vocabulary_reward,
)

if TYPE_CHECKING:
    from tests.support.server import Server

# A second thread beside a busy server slows the first one down many times over.
torch.set_num_threads(1)

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
"""What nothing but a GPU can show; everything else runs everywhere."""

POISON = 319
"""A token whose embedding is NaN in the reward model `broken`: any prompt that holds it cannot be scored."""


POLICIES = ("expert", "other", "slim", "adapter", "ill", "tilted")

ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor for one GPU: on the CPU its own choice is another process, which spins while it waits."""

ADMIN_KEY = "harbour-master"

PRESETS = """
steered: {method: pargs, reward_model: first, beta: 1.5}
blended: {method: mixed, policy: expert, mix: 0.7}
picked: {method: best_of_n, reward_model: first, n: 4}
"""


class ByServer(LoadScopeScheduling):
    """With several workers, tests that share a server, or else a file, stay in one of them.

    xdist's own groups have no effect under pytest 9.2, which lacks the attribute that they are kept in.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        if "[V2" in test or "model_runner_v2" in test:
            return "server_v2"
        for folder in ("limits", "faults"):
            if path.startswith(f"tests/server/{folder}"):
                return f"server_{folder}"
        shared = path.startswith(("tests/server", "tests/clients")) and not path.endswith(
            ("test_start.py", "test_demo.py", "test_quantised_base.py")
        )
        return "server" if shared else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
    """For `pytest -n 2`."""
    return ByServer(config, log)


@pytest.fixture
def rng() -> random.Random:
    """Fresh random input; what it was is printed when a test fails. Seeds torch as well."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base`; reward models `first` (Llama), `second` (GPT-2), `narrow` (a window of 64), `broken`, `text`
    (DeBERTa), `every` (a vocabulary head) and `atop` (a head on the base); policies `expert` (Llama), `other` (GPT-2,
    its vocabulary padded), `slim` (a window of 64), `adapter` (LoRA over the base), `ill` (broken as a policy) and
    `tilted` (a head on the base)."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base")
    save_reward(folder / "first", seed=1)
    save_reward(folder / "second", seed=2, kind="GPT2", n_embd=64, n_layer=2, n_head=2, n_positions=512)
    save_reward(folder / "narrow", seed=3, max_position_embeddings=64)
    save_vocabulary_reward(folder / "every", seed=6)
    _save_broken(folder / "broken")
    _save_text_model(folder / "text")
    save_base(folder / "expert", seed=11)
    gpt2: dict[str, Any] = {"kind": "GPT2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
    save_base(folder / "other", seed=12, **gpt2, vocab_size=VOCABULARY + 8)
    save_base(folder / "slim", seed=13, max_position_embeddings=64)
    save_adapter(folder / "adapter", folder / "base", seed=14)
    save_random_head(folder / "atop", folder / "base", REWARD, seed=16)
    save_random_head(folder / "tilted", folder / "base", POLICY, seed=17)
    _poison(save_base(folder / "ill", seed=15), transformers.AutoModelForCausalLM)
    return folder


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """A server with all the reward models, room for few tokens of the base (so that requests are preempted), and
    prompts read in pieces of at most 64 tokens."""
    # A machine with a GPU runs the kernels' tests without the clients that a server's tests need.
    from tests.support.server import Server

    with Server(tmp_path_factory.mktemp("server") / "log", *serve_flags(models)) as running:
        yield running


@pytest.fixture(scope="session")
def server_v2(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """The same over Model Runner V2, whose kernels run in Triton's interpreter."""
    from tests.support.server import V2_ENVIRONMENT, Server

    log = tmp_path_factory.mktemp("v2") / "log"
    with Server(log, *serve_flags(models), environment=V2_ENVIRONMENT) as running:
        assert "Using V2 Model Runner" in log.read_text()
        yield running


def serve_flags(models: Path) -> list[str]:
    """Flags of the shared server."""
    names = ["first", "second", "narrow", "broken", "text", "every", "atop"]
    rewards = [flag for name in names for flag in ("--reward-model", f"{name}={models / name}")]
    policies = [flag for name in POLICIES for flag in ("--policy", f"{name}={models / name}")]
    presets = models / "presets.yaml"
    presets.write_text(PRESETS)
    return [
        *(str(models / "base"), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", ONE_PROCESS),
        *("--max-model-len", "256", "--max-num-seqs", "32", "--max-num-batched-tokens", "64"),
        *("--block-size", "32", "--num-gpu-blocks-override", "20", "--guidance-cache", "0.1"),
        *("--guidance-presets", str(presets)),
        *("--admin-api-key", ADMIN_KEY, "--admin-model-root", str(models)),
        *rewards,
        *policies,
    ]


def _save_broken(folder: Path) -> None:
    _poison(save_reward(folder, seed=4), transformers.AutoModelForSequenceClassification)


def _poison(folder: Path, kind: Any) -> None:
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(folder)


def _save_text_model(folder: Path) -> None:
    config = transformers.DebertaV2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, type_vocab_size=0, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).float()
    randomise(model, seed=5, spread=0.3).save_pretrained(folder)  # type: ignore[operator]
    build_tokenizer(vocabulary=300).save_pretrained(folder)
