"""`python -m steersman.benchmarks.gpu.time_kernels`: the contests of `benchmarks.kernels`, for so many seconds.

Our kernels come first, at every shape; then torch's own operations and other libraries' kernels, then torch.compile,
which takes seconds for every shape. Where there is no GPU a few tiny contests are timed by the host's clock.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from steersman.benchmarks.contests import COMPILED, OURS, Contest, all_contests
from steersman.benchmarks.gpu.findings import Findings, describe_error, stage_parser
from steersman.benchmarks.kernels import Device, measure_device, over_floor, run_contest, time_calls, time_on_host

_NO_DEVICE = Device("CPU", 1e10, 0.0)


def main(argv: Sequence[str]) -> int:
    """Writes a finding for each version of each contest; 1 where one of ours is wrong."""
    parser = stage_parser("time_kernels", __doc__)
    parser.add_argument("--seconds", type=float, default=70.0, help="After which no contest is begun.")
    args = parser.parse_args(list(argv))
    findings, began = Findings(args.out, "kernels"), time.perf_counter()
    device = _NO_DEVICE if args.tiny else measure_device()
    wrong = 0
    for contest, versions in _rounds(args.tiny):
        if time.perf_counter() - began > args.seconds:
            findings.add("out of time", kernel=contest.kernel, shape=contest.shape, versions=versions)
            break
        try:
            timed = run_contest(contest, time_on_host if args.tiny else time_calls, versions, 1 if args.tiny else None)
        except Exception as error:
            wrong += OURS in versions
            what = {"kernel": contest.kernel, "shape": contest.shape, "versions": versions}
            findings.add("raised", **what, error=describe_error(error))
            continue
        for row in timed:
            wrong += row.version == OURS and not row.right
            findings.add("timed", **asdict(row), over_floor=round(over_floor(row, device), 2))
    return int(wrong > 0)


def _rounds(tiny: bool) -> Iterator[tuple[Contest, list[str]]]:
    """Every contest three times, each time with other versions."""
    if tiny:
        every = list(all_contests(torch.device("cpu"), [(2, 300)], context=32))
        contests = list({contest.kernel.split(",")[0]: contest for contest in reversed(every)}.values())
    else:
        contests = list(all_contests(torch.device("cuda")))
    kinds = ([OURS], None) if tiny else ([OURS], None, [COMPILED])
    for versions in kinds:
        for contest in contests:
            others = [name for name in contest.versions if name not in (OURS, COMPILED)]
            yield contest, others if versions is None else versions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
