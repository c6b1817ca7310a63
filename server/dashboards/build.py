"""`python -m steersman.server.dashboards.build`: Grafana's dashboards and Prometheus's rules, written to `deploy/`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from steersman.server.dashboards.cost import COST
from steersman.server.dashboards.grafana import to_json
from steersman.server.dashboards.guidance import GUIDANCE
from steersman.server.dashboards.overview import OVERVIEW
from steersman.server.dashboards.rules import build_rules

DASHBOARDS = (OVERVIEW, GUIDANCE, COST)
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = Path("prometheus/rules.yaml")


def build_files() -> dict[Path, str]:
    """Path within `deploy/` → content."""
    pages = {Path("grafana/dashboards") / f"{page.uid}.json": to_json(page) for page in DASHBOARDS}
    return pages | {RULES: yaml.safe_dump(build_rules(), sort_keys=False, width=120)}


def main(argv: Sequence[str]) -> int:
    """Takes no arguments; overwrites what is there."""
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    for path, content in build_files().items():
        (DEPLOY / path).parent.mkdir(parents=True, exist_ok=True)
        (DEPLOY / path).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
