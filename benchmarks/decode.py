"""`python -m steersman.benchmarks.decode`: inter-token latency of guided beside plain decoding, for models of given
shapes with random weights, in vLLM itself.

All sequences decode in step behind prompts of `--context` tokens. The latency is the difference between a long and a
short answer over the difference of their lengths, so that reading the prompts does not count; plain and guided runs
alternate. On a GPU the floor of each method is shown beside it: the time to read the auxiliary model's weights once
more at the copy rate of the same run.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from steersman.benchmarks.common.rendering import BLUE, GREEN, ORANGE, RED, markdown, terminal
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.benchmarks.shapes import SHAPES, save_auxiliary, save_base
from steersman.server.adapters import attach_adapter
from steersman.server.config import CONFIG_KEY, WORKER_EXTENSION, ServerConfig

GUIDANCE: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "PARGS, k = 10": {"method": "pargs", "reward_model": "causal", "top_k": 10, "beta": 1.0},
    "PARGS, vocabulary head": {"method": "pargs", "reward_model": "vocabulary", "top_k": 10, "beta": 1.0},
    "mixed": {"method": "mixed", "policy": "policy", "mix": 0.5},
}
_NEEDS = {"PARGS, k = 10": "causal", "PARGS, vocabulary head": "vocabulary", "mixed": "policy"}

_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""On a CPU vLLM's own choice is another process, which spins while it waits."""

Generate = Callable[[str, int, int], float]
"""Method, sequences and tokens → seconds."""


@dataclass(frozen=True)
class Latency:
    """One method at one number of sequences; milliseconds a token and sequence."""

    method: str
    sequences: int
    milliseconds: float
    """Median over rounds."""
    rounds: list[float]
    ratio: float
    """Median over rounds of guided over the plain run beside it."""
    tokens_per_second: float
    floor: float | None
    """What the ratio would be if the auxiliary model's weights alone were read beside plain decoding."""


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, and writes JSON, Markdown and a plot."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    methods = {
        name: guidance
        for name, guidance in GUIDANCE.items()
        if guidance is None or getattr(args, _NEEDS[name]) is not None
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        models = save_models(Path(folder), args, device, console)
        sizes = {name: sum(f.stat().st_size for f in path.glob("*.safetensors")) for name, path in models.items()}
        rate = _copy_rate() if device.type == "cuda" else None
        generate = start_engine(models, methods, args)
        latencies = []
        for sequences in args.sequences:
            shown = track(range(args.rounds), f"{sequences} sequences", console=console)
            rounds = [measure_round(generate, list(methods), sequences, args.tokens) for _ in shown]
            floors = {name: sizes[_NEEDS[name]] / rate for name in methods if name in _NEEDS} if rate else {}
            latencies += summarise(rounds, sequences, floors)
        steps = args.memory_steps
        memory = measure_memory(generate, list(methods), steps, args.tokens) if steps else None
    write_results(args.out, latencies, vars(args), memory, console)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.decode", description=__doc__)
    shapes = sorted(SHAPES)
    parser.add_argument("--base", choices=shapes, default="8b")
    parser.add_argument("--causal", choices=shapes, default="0.5b", help="Reward model that reads candidates.")
    parser.add_argument("--vocabulary", choices=shapes, help="Reward model with a vocabulary head.")
    parser.add_argument("--policy", choices=shapes, help="Policy that is mixed in.")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=1024, help="Tokens of a prompt.")
    parser.add_argument(
        "--tokens", type=int, default=128, help="Tokens of the longer answer; the shorter has a fourth."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance-cache", type=float, default=8.0, help="GiB for the auxiliary models' caches.")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--memory-steps", type=int, default=0, help="Decode so many steps more and compare memory.")
    parser.add_argument(
        "--scratch", type=Path, help="Folder for the models' random weights; by default a temporary one."
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode")
    return parser.parse_args(list(argv))


def save_models(folder: Path, args: argparse.Namespace, device: torch.device, console: Console) -> dict[str, Path]:
    """The base's folder and one for each auxiliary model, by kind."""
    base = SHAPES[args.base]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    longest = args.context + args.tokens
    models = {"base": save_base(folder / "base", base, longest + 16, dtype)}
    kinds = [kind for kind in ("causal", "vocabulary", "policy") if getattr(args, kind) is not None]
    for kind in track(kinds, "random weights", console=console):
        shape = SHAPES[getattr(args, kind)]
        saved = save_auxiliary(folder / kind, shape, base.vocabulary, longest + 16, kind, dtype, device)
        models[kind] = saved
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return models


def start_engine(
    models: dict[str, Path], methods: dict[str, dict[str, Any] | None], args: argparse.Namespace
) -> Generate:
    """vLLM with guidance in this program, and a function that decodes."""
    from vllm import LLM, EngineArgs, SamplingParams

    rewards: dict[str, str] = {kind: str(models[kind]) for kind in ("causal", "vocabulary") if kind in models}
    policies = {"policy": str(models["policy"])} if "policy" in models else {}
    config = ServerConfig(rewards, policies, args.guidance_cache)
    options: dict[str, Any] = {
        "model": str(models["base"]),
        "load_format": "dummy",
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "enforce_eager": not torch.cuda.is_available(),
        **({} if torch.cuda.is_available() else {"distributed_executor_backend": _ONE_PROCESS}),
        "max_model_len": args.context + args.tokens,
        "max_num_seqs": max(args.sequences),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "additional_config": {CONFIG_KEY: config.dump()},
        "worker_extension_cls": WORKER_EXTENSION,
    }
    chosen = EngineArgs(**options).create_engine_config()
    attach_adapter(chosen)
    engine = LLM(**options, logits_processors=chosen.model_config.logits_processors)
    engine.collective_rpc("steersman_prepare")
    vocabulary = SHAPES[args.base].vocabulary

    def generate(method: str, sequences: int, tokens: int) -> float:
        params, prompts = [], []
        for _ in range(sequences):
            extra = {CONFIG_KEY: {"guidance": methods[method], "key": uuid.uuid4().hex}} if methods[method] else None
            params.append(SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, extra_args=extra))
            ids = [random.randrange(2, vocabulary) for _ in range(args.context - tokens // 2)]
            prompts.append({"prompt_token_ids": ids})
        began = time.perf_counter()
        answers = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)
        return seconds

    return generate


def measure_round(generate: Generate, methods: Sequence[str], sequences: int, tokens: int) -> dict[str, float]:
    """Milliseconds a token of every method, in random order."""
    order = random.sample(list(methods), len(methods))
    found = {}
    for method in order:
        # Both answers lie around the same context, so that their difference is decoding alone.
        short = generate(method, sequences, tokens // 4)
        found[method] = 1e3 * (generate(method, sequences, tokens) - short) / (tokens - tokens // 4)
    return found


def summarise(rounds: Sequence[dict[str, float]], sequences: int, floors: dict[str, float]) -> list[Latency]:
    """A row for each method. floors: seconds in which an auxiliary model's weights are read."""
    plain = statistics.median(found["plain"] for found in rounds)
    rows = []
    for method in rounds[0]:
        own = [found[method] for found in rounds]
        median = statistics.median(own)
        ratio = statistics.median(found[method] / found["plain"] for found in rounds)
        floor = 1 + 1e3 * floors[method] / plain if method in floors else None
        rows.append(Latency(method, sequences, median, own, ratio, 1e3 * sequences / median, floor))
    return sorted(rows, key=lambda row: list(GUIDANCE).index(row.method))


def measure_memory(generate: Generate, methods: Sequence[str], steps: int, length: int) -> dict[str, float]:
    """MiB in use before and after about `steps` decoding steps, on a GPU its own, else these processes'; all methods in
    turn, answers of `length` tokens. Caches and graphs are there from the start, so nothing should have grown."""
    for method in methods:
        generate(method, 1, length)
    before = _used_memory()
    for n in track(range(steps // length), "memory"):
        generate(methods[n % len(methods)], 1, length)
    return {"steps": steps // length * length, "before_mib": before, "after_mib": _used_memory()}


def _used_memory() -> float:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    import psutil

    process = psutil.Process()
    return float(sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])) / 2**20


def _copy_rate() -> float:
    from steersman.benchmarks.kernels import measure_device

    return measure_device().bytes_per_second


def table(latencies: Sequence[Latency]) -> dict[str, list[str]]:
    """Headings and cells, a row for each method and number of sequences."""
    return {
        "sequences": [str(row.sequences) for row in latencies],
        "method": [row.method for row in latencies],
        "ms a token": [f"{row.milliseconds:.2f}" for row in latencies],
        "over plain": [f"{row.ratio:.2f}" for row in latencies],
        "floor": ["" if row.floor is None else f"{row.floor:.2f}" for row in latencies],
        "tokens/s": [f"{row.tokens_per_second:.0f}" for row in latencies],
    }


def write_results(
    out: Path, latencies: Sequence[Latency], asked: dict[str, Any], memory: dict[str, float] | None, console: Console
) -> None:
    """`out`.json, .md and .png, and the table on the terminal."""
    rows = table(latencies)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shapes = ", ".join(f"{kind} {asked[kind]}" for kind in ("base", "causal", "vocabulary", "policy") if asked[kind])
    title = f"{device}: {shapes}, context {asked['context']}"
    console.print(terminal(rows, title))
    shown = ""
    if memory is not None:
        shown = f"\nMemory over {memory['steps']} steps: {memory['before_mib']:.0f} → {memory['after_mib']:.0f} MiB.\n"
        console.print(shown.strip())
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
    body = {"device": device, "asked": asked, "memory": memory, "latencies": [asdict(row) for row in latencies]}
    write_json(out.with_suffix(".json"), body)
    out.with_suffix(".md").write_text(
        f"# Decoding\n\n{title}.\n\n{markdown(rows)}{shown}\n![Decoding]({out.stem}.png)\n"
    )
    plot(latencies, title, out.with_suffix(".png"))
    console.print(f"written: {out}.json, .md and .png")


def plot(latencies: Sequence[Latency], title: str, path: Path) -> None:
    """Guided over plain latency at every number of sequences, and the floors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8))
    sequences = sorted({row.sequences for row in latencies})
    guided = [name for name in dict.fromkeys(row.method for row in latencies) if name != "plain"]
    plain = {row.sequences: row.rounds for row in latencies if row.method == "plain"}
    width = 0.8 / max(1, len(guided))
    for n, (name, colour) in enumerate(zip(guided, (BLUE, GREEN, ORANGE, RED), strict=False)):
        rows = sorted((row for row in latencies if row.method == name), key=lambda row: row.sequences)
        places = [m + (n - (len(guided) - 1) / 2) * width for m in range(len(sequences))]
        axis.bar(places, [row.ratio for row in rows], width, color=colour, label=name)
        for place, row in zip(places, rows, strict=True):
            own = [value / other for value, other in zip(row.rounds, plain[row.sequences], strict=True)]
            axis.plot([place] * len(own), own, "k.", markersize=3)
            if row.floor is not None:
                axis.plot([place - width / 2, place + width / 2], [row.floor] * 2, "k-", linewidth=1.2)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(sequences)), [str(count) for count in sequences])
    axis.set(xlabel="sequences", ylabel="latency over plain (dots: rounds, lines: floors)", title=title)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
