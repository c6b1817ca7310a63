"""`python -m steersman.benchmarks.gpu.guided_step`: what guidance adds to a decoding step, without vLLM.

A base model of a given shape decodes one token of every sequence a step as a CUDA graph; reward models and policies of
given shapes with random weights guide it through the runtime, driven as the adapter for Model Runner V2 drives it:
what does not need the base's logits is begun before the base's step, and sampled tokens reach the host a step late.
Plain and guided decoding alternate within a run. That a step never waits for the device is checked by torch's own
synchronisation debug mode.
"""

import argparse
import statistics
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from steersman.benchmarks.gpu.decoding import Decoding, Measured
from steersman.benchmarks.gpu.findings import Findings, describe_error, stage_parser
from steersman.benchmarks.gpu.models import METHODS, Sizes, load_decoding
from steersman.benchmarks.kernels import measure_device
from steersman.benchmarks.shapes import SHAPES


def main(argv: Sequence[str]) -> int:
    """Writes a finding for each method and number of sequences; 1 where a step waited for the device, or something
    raised. What raises is left out, and the rest is measured."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = Findings(args.out, "step")
    sizes = Sizes(args.base, args.auxiliary, args.policy, args.context, args.steps, max(args.sequences), args.cache_gib)
    rate = measure_device().bytes_per_second if device.type == "cuda" else None
    decoding = load_decoding(sizes, device, findings)
    methods = [name for name, needed in METHODS.items() if needed.model in (None, *decoding.models)]
    failed = len(METHODS) - len(methods) - (args.policy is None)
    for sequences in args.sequences:
        decoding.base.prepare(sequences)
        if device.type == "cuda":
            failed += sum(not check_synchronisation(decoding, name, sequences, findings) for name in methods[1:])
        failed += measure(decoding, methods, sequences, args, rate, findings)
    if device.type == "cuda":
        findings.add("memory", peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1))
    return int(failed > 0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; with `--tiny` their defaults are those of a rehearsal."""
    parser = stage_parser("guided_step", __doc__)
    shapes = sorted(SHAPES)
    parser.add_argument("--base", choices=shapes, default="8b")
    parser.add_argument("--auxiliary", choices=shapes, default="0.5b", help="Shape of the reward models.")
    parser.add_argument("--policy", choices=shapes, help="Shape of a policy to mix in; by default there is none.")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=1024, help="Tokens of a prompt.")
    parser.add_argument("--steps", type=int, default=48, help="Decoding steps of a round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-gib", type=float, default=3.0, help="Of each auxiliary model.")
    if "--tiny" in argv:
        tiny = {"base": "tiny", "auxiliary": "tiny", "policy": "tiny", "sequences": [2], "context": 48, "steps": 4}
        parser.set_defaults(**tiny, rounds=2, cache_gib=0.05)
    return parser.parse_args(list(argv))


def check_synchronisation(decoding: Decoding, method: str, sequences: int, findings: Findings) -> bool:
    """Whether steps of a method run to their end while every wait of the host for the device raises."""
    try:
        decoding.run(method, sequences, 3, watched=True)
    except RuntimeError as error:
        where = [
            f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        findings.add("waits", method=method, sequences=sequences, error=str(error)[:200], where=where[-6:])
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    findings.add("never waits", method=method, sequences=sequences)
    return True


def measure(
    decoding: Decoding, methods: Sequence[str], sequences: int, args: argparse.Namespace, rate: float | None,
    findings: Findings,
) -> int:  # fmt: skip
    """Rounds of all methods in turn, every other one backwards, so that a drift of the clock is nobody's gain. Returns
    the number of methods that raised, which are not asked for further rounds."""
    found: dict[str, list[Measured]] = {name: [] for name in methods}
    for turn in range(args.rounds):
        for name in list(found) if turn % 2 == 0 else list(reversed(found)):
            try:
                found[name].append(decoding.run(name, sequences, args.steps))
            except Exception as error:
                if name == "plain":
                    raise
                findings.add("raised", method=name, sequences=sequences, error=describe_error(error))
                del found[name]
    for name, rounds in found.items():
        floor = None if rate is None else 1e3 * decoding.weight_bytes(name) / rate
        findings.add("step", method=name, sequences=sequences, **summarise(rounds, found["plain"], floor))
    return len(methods) - len(found)


def summarise(rounds: Sequence[Measured], plain: Sequence[Measured], floor_ms: float | None) -> dict[str, Any]:
    """Milliseconds a step, and what they are over the plain round beside each. floor_ms: for reading the auxiliary
    model's weights once."""
    added = [own.step_ms - other.step_ms for own, other in zip(rounds, plain, strict=True)]
    ratios = [own.step_ms / other.step_ms for own, other in zip(rounds, plain, strict=True)]
    host = zip(*(own.host_ms for own in rounds), strict=True)
    return {
        "ms": round(statistics.median(own.step_ms for own in rounds), 3),
        "rounds": [round(own.step_ms, 3) for own in rounds],
        "added_ms": round(statistics.median(added), 3),
        "over_plain": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "floor_added_ms": None if floor_ms is None else round(floor_ms, 3),
        "host_ms": [round(statistics.median(part), 3) for part in host],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
