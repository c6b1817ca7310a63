"""`python -m steersman.benchmarks.gpu.sanitize`: every kernel once under compute-sanitizer's memcheck and racecheck.

Without a GPU, or without compute-sanitizer, the same program runs unwatched, and the finding says so.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from steersman.benchmarks.gpu.findings import Findings, stage_parser
from steersman.processes import running

TOOLS = ("memcheck", "racecheck")
_KERNELS = "regex=^_(scan|finish|rerank|gather|stream|sample|blend|project|settle|attend|merge)"
_ERRORS_FOUND = 9
_SECONDS_EACH = 50
_STOP_S = 2
_SUMMARY = re.compile(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*)")


def main(argv: Sequence[str]) -> int:
    """Writes a finding for each tool; 1 where one reports errors or does not run."""
    args = stage_parser("sanitize", __doc__).parse_args(list(argv))
    findings = Findings(args.out, "sanitizer")
    checked = [sys.executable, "-m", "steersman.benchmarks.gpu.check_kernels", "--once", "--out", os.devnull]
    if args.tiny:
        checked.append("--tiny")
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        with running(checked, _STOP_S) as process:
            code = process.wait()
        findings.add("tool", name="none", watched=False, exit_code=code)
        return int(code != 0 or torch.cuda.is_available())
    silent = [_run(tool, checked, findings) for tool in TOOLS]
    return int(not all(silent))


def _run(tool: str, checked: Sequence[str], findings: Findings) -> bool:
    """Whether a tool ran to its end without a report."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(_ERRORS_FOUND), "--print-limit", "20"]
    # Torch's own allocator hands out parts of large blocks, within which no access is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bounded = ["timeout", "--kill-after=5", str(_SECONDS_EACH), *command, "--kernel-name", _KERNELS, *checked]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with running(bounded, _STOP_S, env=environment, text=True, errors="replace", **streams) as process:
        output, _ = process.communicate()
    print(output, flush=True)
    summary, code = _SUMMARY.findall(output), process.returncode
    findings.add("tool", name=tool, watched=True, exit_code=code, summary=summary[-1] if summary else None)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
