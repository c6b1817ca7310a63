"""`python -m steersman.benchmarks.gpu.check_kernels`: every kernel at served sizes against float64, and again.

Inputs are fresh and random; the seed is written. Each case is run twenty times on the same input, which must give the
same bits every time. Where there is no GPU the kernels run in Triton's interpreter at tiny sizes. With `--once` a case
runs once and nothing is compared: what compute-sanitizer watches.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from steersman.benchmarks.gpu.findings import Findings, describe_error, stage_parser
from steersman.benchmarks.gpu.kernel_cases import Case, all_cases, sanitized_cases, tiny_cases
from steersman.benchmarks.kernels import relative_error

_REPETITIONS = 20


def main(argv: Sequence[str]) -> int:
    """Writes a finding for each case; 1 where one is wrong."""
    parser = stage_parser("check_kernels", __doc__)
    parser.add_argument("--once", action="store_true", help="Run each case once, without a comparison.")
    args = parser.parse_args(list(argv))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    findings = Findings(args.out, "check")
    findings.add("seed", seed=seed)
    cases = tiny_cases(device) if args.tiny else sanitized_cases(device) if args.once else all_cases(device)
    verdicts = []
    for case in cases:
        found = _attempt(run_once if args.once else check_case, case)
        verdicts.append(found["verdict"])
        findings.add("kernel", name=case.name, **found)
    return int(any(verdict != "right" for verdict in verdicts))


def _attempt(check: Callable[[Case], dict[str, Any]], case: Case) -> dict[str, Any]:
    try:
        return check(case)
    except Exception as error:
        return {"verdict": "raised", "error": describe_error(error)}


def check_case(case: Case) -> dict[str, Any]:
    """The largest error of each output over its size, and whether repetitions give the same bits."""
    inputs = case.make()
    first = case.run(*_copies(inputs))
    errors = [relative_error(own, exact) for own, exact in zip(first, case.truth(*_copies(inputs)), strict=True)]
    again = (case.run(*_copies(inputs)) for _ in range(_REPETITIONS))
    equal = all(_same_bits(first, other) for other in again)
    right = equal and all(error <= case.limit for error in errors)
    return {"verdict": "right" if right else "wrong", "errors": errors, "limit": case.limit, "equal_bits": equal}


def run_once(case: Case) -> dict[str, Any]:
    """Runs the case and waits for it."""
    case.run(*case.make())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"verdict": "right"}


def _copies(inputs: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]


def _same_bits(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
