"""What operators load elsewhere: the alert rules and the dashboard speak of metrics that there are."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from voicetx import metrics

OPS = Path(__file__).parents[1] / "ops"


def known_names() -> set[str]:
    """Return the names under which the service's figures are found in Prometheus."""
    return {sample.name for family in metrics._own.collect() for sample in family.samples} | {
        f"{family.name}{suffix}"
        for family in metrics._own.collect()
        for suffix in {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.type]
    }


def expressions() -> dict[str, list[str]]:
    """Return the expressions of the dashboard and of the rules."""
    dashboard: dict[str, Any] = json.loads((OPS / "grafana-dashboard.json").read_text())
    return {
        "dashboard": [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]],
        "alerts": [(OPS / "alerts.yaml").read_text()],
    }


@pytest.mark.parametrize("place", ["dashboard", "alerts"])
def test_every_metric_named_is_there(place: str) -> None:
    """The dashboard and the alert rules name no metric that the service does not have."""
    named = {
        name for expression in expressions()[place] for name in re.findall(r"\b(?:voicetx|process)_\w+", expression)
    }
    assert named
    assert named <= known_names()


def test_every_metric_is_on_the_dashboard() -> None:
    """The dashboard shows every metric that the service has."""
    shown = " ".join(expressions()["dashboard"])
    assert not [family.name for family in metrics._own.collect() if family.name not in shown]


@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")])
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    """Prometheus' own tool accepts the rules, and they fire in the cases written down for them and in no other."""
    promtool = shutil.which("promtool")
    if promtool is None:
        # CI installs it (.ci/run); elsewhere it is Debian's package prometheus.
        assert "CI_HAS_PROMTOOL" not in os.environ
        pytest.skip("promtool is missing")
    done = subprocess.run([promtool, *arguments], cwd=OPS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
