"""Prometheus' part in alert rules, as `promtool test rules` plays it: for machines where that is missing.

Expressions are parsed and evaluated by prombed; here are the notation of series, the time that a rule waits before it
fires, and the labels in a summary. Where promtool is there, the same cases are put to both (tests/test_ops.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from prombed import InMemoryStorage, PromQLEngine, Sample

_SECONDS = {"s": 1, "m": 60, "h": 3_600}
_SERIES = re.compile(r"(\w+)\{(.*)\}")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_VALUES = re.compile(r"(-?[\d.]+)(?:([+-][\d.]+))?(?:x(\d+))?")


class Alert(NamedTuple):
    """An alert that fires: its labels, without its name, and its annotations."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def read_duration(text: str) -> int:
    """Return a duration such as 10m in seconds."""
    return int(text[:-1]) * _SECONDS[text[-1]]


def expand(notation: str) -> Iterator[float]:
    """Yield the values that a notation stands for: `1 1 0`, `0+60x10`, `1x20` (a value, and so many times more)."""
    for part in notation.split():
        found = _VALUES.fullmatch(part)
        assert found, f"{part} is no values"
        first, step, times = float(found[1]), float(found[2] or 0), int(found[3] or 0)
        yield from (first + number * step for number in range(times + 1))


def load(test: Mapping[str, Any]) -> PromQLEngine:
    """Return what answers queries about the series of a test."""
    storage = InMemoryStorage(retention_ms=10**10)
    every_ms = read_duration(test["interval"]) * 1000
    for series in test["input_series"]:
        found = _SERIES.fullmatch(series["series"])
        assert found, series["series"]
        labels = {"__name__": found[1], **dict(_LABEL.findall(found[2]))}
        for number, value in enumerate(expand(series["values"])):
            storage.append(labels, Sample(number * every_ms, value))
    return PromQLEngine(storage)


def find_firing(rule: Mapping[str, Any], engine: PromQLEngine, at_seconds: int, every_seconds: int) -> list[Alert]:
    """Return the alerts of a rule that fire at a time, where it is evaluated so often."""
    since: dict[tuple[tuple[str, str], ...], int] = {}
    for now in range(0, at_seconds + 1, every_seconds):
        answer = engine.query(rule["expr"], now * 1000)
        assert answer["status"] == "success", answer
        seen = {tuple(sorted(_without_name(sample["metric"]).items())) for sample in answer["data"]["result"]}
        since = {labels: since.get(labels, now) for labels in seen}
    waited = read_duration(rule.get("for", "0s"))
    return [
        Alert(
            dict(labels) | rule["labels"],
            {name: _render(text, dict(labels)) for name, text in rule["annotations"].items()},
        )
        for labels, began in sorted(since.items())
        if at_seconds - began >= waited
    ]


def _without_name(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name != "__name__"}


def _render(text: str, labels: Mapping[str, str]) -> str:
    """Return a text with labels put in; raises KeyError for one that the alert does not have."""
    rendered = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
    assert "{{" not in rendered, text
    return rendered
