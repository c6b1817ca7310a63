"""The models of `guided_step`: a base, and reward models and policies of given shapes with random weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from steersman.benchmarks.gpu.base_step import BaseStep
from steersman.benchmarks.gpu.decoding import Decoding, Method, synchronise
from steersman.benchmarks.gpu.findings import Findings, describe_error
from steersman.benchmarks.shapes import SHAPES
from steersman.guidance.cached import make_ready
from steersman.guidance.head_files import POLICY, REWARD, BaseFacts, HeadCheckpoint, Probe
from steersman.guidance.head_models import HeadModel, HeadPolicy, HeadReward
from steersman.guidance.heads import Head, HeadShape
from steersman.guidance.overlap import make_side_stream
from steersman.guidance.policies import Policy
from steersman.guidance.rewards import CausalReward, VocabularyReward
from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.tokenizers import POLICY_KINDS


@dataclass(frozen=True)
class Sizes:
    """Shapes of the models and sizes of the decoding that they are loaded for."""

    base: str
    auxiliary: str
    policy: str | None
    context: int
    steps: int
    most_sequences: int
    cache_gib: float

    @property
    def longest(self) -> int:
        """Tokens that a sequence comes to have."""
        return self.context + self.steps + 16


def _pargs(model: str) -> dict[str, Any]:
    return {"method": "pargs", "reward_model": model, "top_k": 10, "beta": 1.0}


METHODS = {
    "plain": Method(None, None),
    "candidate scoring": Method("candidates", _pargs("candidates")),
    "vocabulary head": Method("vocabulary", _pargs("vocabulary")),
    "vocabulary head, one stream": Method("vocabulary", _pargs("vocabulary"), beside=False),
    "vocabulary head, every token": Method("vocabulary", {**_pargs("vocabulary"), "top_k": None}),
    "head": Method("head", _pargs("head")),
    "head, every token": Method("head", {**_pargs("head"), "top_k": None}),
    "mixed with a head": Method("policy head", {"method": "mixed", "policy": "policy head", "mix": 0.5}),
    "mixed": Method("policy", {"method": "mixed", "policy": "policy", "mix": 0.5}),
}


def load_decoding(sizes: Sizes, device: torch.device, findings: Findings) -> Decoding:
    """Makes every model, captures its step and checks it, with a finding for each; one that fails is left out."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, vocabulary = SHAPES[sizes.base], SHAPES[sizes.base].vocabulary
    began = time.perf_counter()
    base = BaseStep(shape, vocabulary, sizes.context, dtype, device)
    synchronise(device)
    findings.add("loaded", model=f"base, {sizes.base}", seconds=round(time.perf_counter() - began, 1))
    cache, rows = int(sizes.cache_gib * 2**30), sizes.most_sequences

    def draw(name: str, **changes: Any) -> Any:
        config = SHAPES[name].config(sizes.longest, **changes)
        config.vocab_size = vocabulary
        family = transformers.AutoModelForSequenceClassification if changes else transformers.AutoModelForCausalLM
        with device:
            return family.from_config(config, dtype=dtype).eval()

    makers: dict[str, Callable[[], Any]] = {
        "candidates": lambda: CausalReward(draw(sizes.auxiliary, num_labels=1), "candidates", cache, rows),
        "vocabulary": lambda: VocabularyReward(draw(sizes.auxiliary), "vocabulary", cache, rows),
    }
    facts = BaseFacts("random", shape.hidden, shape.layers, vocabulary)
    for name, role in (("head", REWARD), ("policy head", POLICY)):
        makers[name] = partial(_draw_head, name, role, facts, device)
    if sizes.policy is not None:
        policy_shape = sizes.policy
        makers["policy"] = lambda: Policy(draw(policy_shape), "policy", cache, rows)
    models: dict[str, Any] = {}
    for name, make in makers.items():
        began = time.perf_counter()
        try:
            model = make()
            make_ready(model)
            synchronise(device)
        except Exception as error:
            findings.add("raised", model=name, error=describe_error(error))
            continue
        models[name] = model
        findings.add(
            "loaded", model=name, seconds=round(time.perf_counter() - began, 1),
            weight_bytes=model.describe()["weight_bytes"],
            graphs=[] if isinstance(model, HeadModel) else model.model.sizes,
        )  # fmt: skip
    policies = {name: model for name, model in models.items() if model.kind in POLICY_KINDS}
    rewards = {name: model for name, model in models.items() if name not in policies}
    runtime = GuidanceRuntime(rewards, 1, policies, make_side_stream(device))
    return Decoding(base, runtime, models, METHODS, sizes.context, device)


def _draw_head(name: str, role: str, base: BaseFacts, device: torch.device) -> HeadModel:
    """A head of random weights: a middle of 256, f(h) of 128."""
    with torch.device("cpu"):
        head = Head(HeadShape(base.hidden_size, 256, 128, base.vocabulary))
        probe = Probe([[1]], torch.zeros(1, base.hidden_size))
    family = HeadReward if role == REWARD else HeadPolicy
    return family(HeadCheckpoint(head, role, base, probe, {}), name, device)
