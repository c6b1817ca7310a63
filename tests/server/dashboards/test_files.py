"""What is committed for Grafana and Prometheus: built from the code, accepted by Prometheus's own tool, and firing
when it should."""

import json
import subprocess
from pathlib import Path

import pytest

from steersman.benchmarks.prometheus import find_program
from steersman.server.dashboards.build import DASHBOARDS, DEPLOY, RULES, build_files
from steersman.server.dashboards.rules import ALERTS


@pytest.mark.parametrize("path", build_files(), ids=str)
def test_what_is_committed_is_what_the_code_builds(path: Path) -> None:
    assert (DEPLOY / path).read_text(encoding="utf-8") == build_files()[path], (
        "run python -m steersman.server.dashboards.build"
    )


@pytest.mark.parametrize("page", DASHBOARDS, ids=lambda page: page.uid)
def test_every_panel_reaches_grafana_with_all_of_its_queries(page) -> None:  # type: ignore[no-untyped-def]
    content = json.loads((DEPLOY / "grafana" / "dashboards" / f"{page.uid}.json").read_text(encoding="utf-8"))
    shown = [panel for panel in content["panels"] if panel["type"] != "row"]
    wanted = [panel for row in page.rows for panel in row.panels]
    assert [panel["title"] for panel in shown] == [panel.title for panel in wanted]
    for panel, source in zip(shown, wanted, strict=True):
        assert [target["expr"] for target in panel["targets"]] == [query.expr for query in source.queries]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert {variable["name"] for variable in content["templating"]["list"]} >= {"model", "method"}


def test_rules_are_accepted_and_fire_on_made_up_series() -> None:
    promtool = find_program("promtool")
    checked = subprocess.run([promtool, "check", "rules", DEPLOY / RULES], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tests = DEPLOY / "prometheus" / "rules_test.yaml"
    tried = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True, cwd=tests.parent)
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_every_alert_is_tried_firing() -> None:
    tests = (DEPLOY / "prometheus" / "rules_test.yaml").read_text(encoding="utf-8")
    for alert in ALERTS:
        assert f"alertname: {alert.name}\n" in tests
