"""Reads a server's `/metrics` as a scraper does."""

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Server

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read_metrics(server: Server) -> Series:
    """Every sample by its name and labels."""
    text = server.get("/metrics").raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(series: Series, name: str, **labels: str) -> float:
    """The sum of a metric over every series that has these labels; fails if there is none."""
    wanted = set(labels.items())
    found = [value for (metric, held), value in series.items() if metric == name and wanted <= held]
    assert found, f"no series {name} with {labels}"
    return sum(found)


def growth(before: Series, after: Series) -> Series:
    """How much each series has grown; one that is new began at 0."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def names(series: Mapping[tuple[str, frozenset[tuple[str, str]]], float], prefix: str) -> set[str]:
    """Names of samples that begin with a prefix."""
    return {name for name, _ in series if name.startswith(prefix)}
