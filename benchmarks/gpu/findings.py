"""What the stages of a GPU day find out: a JSON line each, on disk as soon as it is known."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Findings:
    """A file that all stages append to. A stage that is stopped at its time has written what it knew by then."""

    path: Path
    stage: str

    def add(self, what: str, **fields: Any) -> None:
        """Appends {"stage", "what", …} and prints it."""
        line = json.dumps({"stage": self.stage, "what": what, **fields})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def read_findings(path: Path) -> list[dict[str, Any]]:
    """All lines in order; none where no stage has written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def describe_error(error: Exception) -> str:
    """The kind of an error and the start of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def stage_parser(stage: str, description: str | None) -> argparse.ArgumentParser:
    """The flags that every stage takes: where findings go, and whether sizes are a rehearsal's."""
    parser = argparse.ArgumentParser(prog=f"python -m steersman.benchmarks.gpu.{stage}", description=description)
    parser.add_argument("--out", type=Path, default=Path("findings.jsonl"), help="File that findings are appended to.")
    parser.add_argument("--tiny", action="store_true", help="Sizes of a rehearsal without a GPU.")
    return parser
