"""What operators load elsewhere: the alert rules and the dashboard speak of metrics that there are."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import alerting
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


def read_rules() -> dict[str, dict[str, Any]]:
    """Return the alert rules by name."""
    groups = yaml.safe_load((OPS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def read_cases() -> list[dict[str, Any]]:
    """Return the cases of when rules fire."""
    tests: list[dict[str, Any]] = yaml.safe_load((OPS / "alerts_test.yaml").read_text())["tests"]
    return tests


def test_alerts_fire_in_their_cases_and_in_no_other() -> None:
    """Each alert rule fires in a case written down for it, with its labels and summary, and in no other case."""
    rules, fired = read_rules(), set()
    for test in read_cases():
        engine = alerting.load(test)
        for case in test["alert_rule_test"]:
            name, at_seconds = case["alertname"], alerting.read_duration(case["eval_time"])
            expected = [alerting.Alert(alert["exp_labels"], alert["exp_annotations"]) for alert in case["exp_alerts"]]
            assert alerting.find_firing(rules[name], engine, at_seconds, every_seconds=60) == expected, case
            fired.update([name] if expected else [])
    assert fired == rules.keys()


def test_promtool_finds_the_same() -> None:
    """Where Prometheus' own tool is, it accepts the rules, and finds them to fire in the same cases."""
    promtool = shutil.which("promtool")
    # CI installs it (.ci/run); elsewhere it is in Debian's package prometheus. Without it, the test above is the judge.
    assert promtool is not None or "CI_HAS_PROMTOOL" not in os.environ
    for arguments in (("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")) if promtool else ():
        done = subprocess.run([promtool, *arguments], cwd=OPS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
