"""Dashboards as plain data: what is shown, before it is put into Grafana's form.

Queries may use `$instance`, `$method`, `$model` and Grafana's `$__rate_interval`.
"""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["short", "percentunit", "s", "bytes", "reqps", "ops", "none"]
"""Grafana's own names of units."""

BY_INSTANCE = 'instance=~"$instance"'
BY_METHOD = f'{BY_INSTANCE},method=~"$method"'
BY_MODEL = f'{BY_INSTANCE},model=~"$model"'


@dataclass(frozen=True)
class Query:
    """One query of a panel; `legend` may name labels as {{label}}."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A chart over time."""

    title: str
    description: str
    """The question that it answers."""
    queries: tuple[Query, ...]
    unit: Unit = "short"
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


def rate(metric: str, labels: str) -> str:
    """Growth a second over Grafana's own interval."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def sum_rate(metric: str, labels: str, by: str = "") -> str:
    """`rate` added up over everything but the labels `by`."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} ({rate(metric, labels)})"


def ratio(part: str, whole: str, labels: str, by: str = "", only: str = "") -> str:
    """The growth of one counter, `only` where it has these labels too, over that of another."""
    return f"{sum_rate(part, f'{labels},{only}' if only else labels, by)} / {sum_rate(whole, labels, by)}"


def quantile(q: float, histogram: str, labels: str, by: str = "") -> str:
    """A quantile of what a histogram observed."""
    return f"histogram_quantile({q}, {sum_rate(f'{histogram}_bucket', labels, f'{by}, le' if by else 'le')})"


def quantiles(histogram: str, labels: str, by: str = "", levels: tuple[float, ...] = (0.5, 0.95)) -> tuple[Query, ...]:
    """A query for each level."""
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(Query(quantile(q, histogram, labels, by), f"{name}p{round(100 * q)}") for q in levels)
