"""`python -m steersman.benchmarks.dashboards`: pictures of every dashboard, from a real run and its own queries."""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.benchmarks.common.demo import demo_server, read_prompts
from steersman.benchmarks.load import METHODS
from steersman.benchmarks.load_traffic import PLAIN, Arm, Traffic, send
from steersman.benchmarks.prometheus import Prometheus, run_prometheus
from steersman.server.dashboards.build import DASHBOARDS, DEPLOY, RULES
from steersman.server.dashboards.panels import Dashboard, Panel, Query

_STEP, _WINDOW = 5.0, "30s"
_SPOILED: dict[str, Any] = {"method": "pargs", "reward_model": "nobody"}
"""Refused, so that refusals have something to show."""
_PORT = 8038


def main(argv: Sequence[str]) -> int:
    """Writes OUT/UID.png for each dashboard."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.dashboards", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="Of traffic.")
    parser.add_argument("--out", type=Path, default=DEPLOY.parent / "docs" / "images")
    args = parser.parse_args(list(argv))
    args.out.mkdir(parents=True, exist_ok=True)
    with demo_server(None, _PORT) as url, run_prometheus(url.removeprefix("http://"), DEPLOY / RULES) as prometheus:
        began = time.time()
        asyncio.run(_send(url, 60 * args.minutes))
        for page in DASHBOARDS:
            draw(page, prometheus, began, time.time(), args.out / f"{page.uid}.png")
    return 0


async def _send(url: str, seconds: float) -> None:
    """Three levels of traffic, the second the highest."""
    kinds = tuple(kind for name, guidance in METHODS.items() for kind in ((PLAIN, None), (name, guidance)))
    for rate in (3.0, 8.0, 4.0):
        traffic = Traffic(url, "demo", read_prompts("reporting"), 100, seconds / 3, 48)
        await send(traffic, Arm("mixed", (*kinds, ("refused", _SPOILED))), rate)


def draw(page: Dashboard, prometheus: Prometheus, start: float, end: float, path: Path) -> None:
    """Every panel of a page where Grafana would have it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(20, 3.6 * len(page.rows)), layout="constrained")
    figure.suptitle(page.title, fontsize=16)
    for part, row in zip(figure.subfigures(len(page.rows), 1, squeeze=False)[:, 0], page.rows, strict=True):
        part.suptitle(row.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for axes, panel in zip(part.subplots(1, len(row.panels), squeeze=False)[0], row.panels, strict=True):
            _draw_panel(axes, panel, prometheus, start, end)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _draw_panel(axes: Any, panel: Panel, prometheus: Prometheus, start: float, end: float) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for query in panel.queries:
        for series in prometheus.query_range(_fill(query.expr), start, end, _STEP):
            values = [((at - start) / 60, float(value)) for at, value in series["values"]]
            if any(math.isfinite(value) for _, value in values):
                lines[_name(query, series["metric"])] = values
    times = sorted({at for values in lines.values() for at, _ in values})
    if panel.stacked:
        dense = {name: dict(values) for name, values in lines.items()}
        rows = [[_finite(values.get(at, 0.0)) for at in times] for values in dense.values()]
        axes.stackplot(times, rows, labels=list(dense), alpha=0.7)
    else:
        for name, values in lines.items():
            axes.plot(*zip(*values, strict=True), label=name, linewidth=1)
    axes.set_title(f"{panel.title} ({panel.unit})" if panel.unit not in ("short", "none") else panel.title, fontsize=10)
    axes.set_xlabel("minutes", fontsize=8)
    axes.tick_params(labelsize=8)
    if panel.unit != "none":
        # A little room on both sides: lines at 0, and those that never change, are to be seen.
        top = axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1.0
        axes.set_ylim(-0.03 * top, 1.1 * top)
    if len(lines) <= 12:
        axes.legend(fontsize=6, loc="upper left", ncols=2 if len(lines) > 5 else 1)


def _fill(expr: str) -> str:
    """Grafana's variables at their first choice."""
    for name in ("instance", "method", "model"):
        expr = expr.replace(f"${name}", ".*")
    return expr.replace("$__rate_interval", _WINDOW)


def _name(query: Query, labels: dict[str, str]) -> str:
    name = query.legend
    for label, value in labels.items():
        name = name.replace(f"{{{{{label}}}}}", value)
    return name


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
