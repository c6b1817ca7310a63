"""`python -m steersman.benchmarks.gpu.compile_kernels`: compiles every launch of production on all cores.

Where there is a GPU it is compiled for it by the path that a launch takes, so that the stages behind this one find the
kernels in Triton's cache. Elsewhere one launch of each kernel is compiled for Hopper.
"""

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict

import torch

from steersman.benchmarks.gpu.findings import Findings, describe_error, stage_parser
from steersman.kernels.launch import Launch
from steersman.kernels.production import distinct_launches, production_launches
from steersman.processes import process_pool

_REHEARSED = ("topk scan", "rerank, k = 16", "blend write, exact", "attention, T = 11, d = 64, bf16")


def main(argv: Sequence[str]) -> int:
    """Writes a finding for each launch that does not compile and one for all of them; 1 where one did not."""
    args = stage_parser("compile_kernels", __doc__).parse_args(list(argv))
    findings = Findings(args.out, "compile")
    names = list(_REHEARSED) if args.tiny else list(distinct_launches(production_launches()))
    began, failed, seconds = time.perf_counter(), 0, 0.0
    with process_pool(min(14, os.cpu_count() or 1)) as pool:
        work = {pool.submit(compile_named, name): name for name in names}
        for done, future in enumerate(as_completed(work), start=1):
            took, error = future.result()
            seconds += took
            if error is not None:
                failed += 1
                findings.add("launch", name=work[future], error=error)
            print(f"{done} of {len(names)}: {work[future]}, {took:.1f} s", flush=True)
    wall = round(time.perf_counter() - began, 1)
    findings.add("launches", compiled=len(names) - failed, failed=failed, wall_s=wall, work_s=round(seconds, 1))
    return int(failed > 0)


def compile_named(name: str) -> tuple[float, str | None]:
    """Compiles one launch of production; returns the seconds that it took and the error, if there was one."""
    began = time.perf_counter()
    try:
        _compile(production_launches()[name])
    except Exception as error:
        return time.perf_counter() - began, describe_error(error)
    return time.perf_counter() - began, None


def _compile(launch: Launch) -> None:
    if torch.cuda.is_available():
        launch.compile()
        return
    from steersman.kernels.resources import compile_launch

    print(asdict(compile_launch(launch, 90)), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
