"""The `steersman` command. Every subcommand imports what it needs only when it runs."""

import importlib
import sys
from collections.abc import Sequence

from steersman.processes import exit_on_signals, leave
from steersman.server.logs import configure_as_chosen

_COMMANDS = {
    "serve": ("steersman.server.serve", "serve a frozen model with guidance over the OpenAI API"),
    "demo": ("steersman.demo", "serve the bundled demo models and show one prompt with and without guidance"),
    "data": ("steersman.training.data.command", "check preference data, cut it into segments, have them scored"),
    "train": ("steersman.training.command", "train reward models and policies"),
    "evaluate": ("steersman.benchmarks.quality", "measure how good guided answers are, through a server"),
    "bench": ("steersman.benchmarks.command", "measure what guidance costs, beside plain decoding; bench load: under load"),
}

# Here because a process that vLLM starts imports this module again, before it imports vLLM.
configure_as_chosen()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(version("steersman"))
        return 0
    if name not in _COMMANDS:
        print(f"steersman: {name!r} is not a command\n{_usage()}", file=sys.stderr)
        return 2
    exit_on_signals()
    code = int(importlib.import_module(_COMMANDS[name][0]).main(rest))
    if name == "serve" and argv is None and code == 0:
        # The engine and its workers have ended, and every connection is closed.
        leave(code)
    return code


def _usage() -> str:
    lines = [f"  {name:10}{text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join(["usage: steersman COMMAND [flags]", "", *lines, "", "steersman COMMAND --help shows its flags."])


if __name__ == "__main__":
    sys.exit(main())
