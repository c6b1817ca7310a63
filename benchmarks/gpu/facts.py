"""`python -m steersman.benchmarks.gpu.facts`: the card, its copy rate, and the software that is there."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from steersman.benchmarks.common.results import environment
from steersman.benchmarks.gpu.findings import Findings, stage_parser
from steersman.benchmarks.kernels import measure_device

_ASKED = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,power.limit"


def main(argv: Sequence[str]) -> int:
    """Writes the environment and, where there is a GPU, what nvidia-smi and a copy of a gigabyte tell of it."""
    args = stage_parser("facts", __doc__).parse_args(list(argv))
    findings = Findings(args.out, "facts")
    findings.add("environment", **environment())
    if not torch.cuda.is_available():
        findings.add("device", name="CPU", rehearsal=True)
        return 0
    findings.add("device", rehearsal=False, **asdict(measure_device()))
    findings.add("card", cuda=torch.version.cuda, capability=torch.cuda.get_device_capability(), smi=_query_card())
    return 0


def _query_card() -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return dict(zip(_ASKED.split(","), values, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
