"""Render pages from templates, and keep the files that pages load.

Everything that is put into a page is escaped, except our own pictures. Knows neither requests nor the database.
"""

import hashlib
import mimetypes
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from voicetx.contract.codes import CALL_STATES, DROP_CODES
from voicetx.contract.refusals import Refusal
from voicetx.dashboard import charts
from voicetx.dashboard.overview import KINDS, SPANS, Overview

PARTS = ("clock", "headline", "figures", "outcomes", "timeline", "keys", "talk", "attempts", "senders", "missing")
"""The parts of a deployment's page that change while it is open; each has the id `part-` and its name."""


class Asset(NamedTuple):
    """A file that pages load."""

    content: bytes
    media_type: str
    digest: str


def _read_assets() -> Mapping[str, Asset]:
    assets = {}
    for file in files("voicetx.dashboard").joinpath("static").iterdir():
        content = file.read_bytes()
        media_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        assets[file.name] = Asset(content, media_type, hashlib.sha256(content).hexdigest()[:16])
    return MappingProxyType(assets)


ASSETS: Mapping[str, Asset] = _read_assets()
"""The files that pages load, by name."""


def render(template: str, **values: Any) -> str:
    """Return a page."""
    return _environment().get_template(template).render(values)


def render_parts(overview: Overview) -> dict[str, str]:
    """Return the parts of a deployment's page by their names."""
    return {name: render_part(name, overview) for name in PARTS}


def summarise(overview: Overview) -> str:
    """Return a sentence about a deployment, for people who use its page with a screen reader."""
    report = overview.report
    rate = _format_share(report.answer_rate)
    return (
        f"{_format_number(report.reported)} of {_format_number(report.transactions)} transactions reported,"
        f" answer rate {rate}, {_format_number(overview.missing_number)} outcomes missing."
    )


def format_clock(milliseconds: int, zone: ZoneInfo) -> str:
    """Return the time that a zone's clock shows at an instant."""
    return f"{_in_zone(milliseconds, zone):%H:%M:%S}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("voicetx.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "number": _format_number,
        "share": _format_share,
        "seconds": _format_seconds,
        "moment": _format_moment,
        "instant": _format_instant,
        "clock": format_clock,
        "span": _format_span,
    }
    environment.globals |= {
        "asset": _address_asset,
        "charts": charts,
        "CALL_STATES": CALL_STATES,
        "DROP_CODES": DROP_CODES,
        "KINDS": KINDS,
        "PARTS": PARTS,
        "SPANS": tuple(SPANS),
        "Refusal": Refusal,
        "choose": _choose,
        "part": lambda name, overview: Markup(render_part(name, overview)),  # noqa: S704 - escaped where it was made
    }
    return environment


def render_part(name: str, overview: Overview) -> str:
    """Return one part of a deployment's page."""
    macros = _environment().get_template("parts.html").module
    return str(getattr(macros, name)(overview))


def _choose(chosen: Mapping[str, str], deployment_id: str, name: str, value: str | None) -> str:
    """Return the query of a list with one filter set (or removed, if `value` is None) and the others unchanged."""
    kept = {other: it for other, it in chosen.items() if other != name}
    return urlencode({"id": deployment_id} | kept | ({name: value} if value is not None else {}))


def _address_asset(name: str) -> str:
    return f"/dashboard/static/{name}?v={ASSETS[name].digest}"


def _format_number(number: int) -> str:
    return f"{number:,}"


def _format_share(share: float | None) -> str:
    """Return a share in percent; only shares of exactly none or all are shown as 0 or 100 %."""
    if share is None:
        return "–"  # noqa: RUF001 - a dash for no number
    percent = share * 100
    if 0 < percent < 0.1:  # noqa: PLR2004 - the smallest share that is shown as a number
        return "< 0.1 %"
    if 99.9 < percent < 100:  # noqa: PLR2004 - the same
        return "> 99.9 %"
    return f"{percent:.1f} %" if percent % 100 else f"{percent:.0f} %"


def _format_seconds(seconds: int | None) -> str:
    """Return a length as people read it, such as 1:05 or 2:00:09."""
    if seconds is None:
        return "–"  # noqa: RUF001 - a dash for no number
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _in_zone(milliseconds: int, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone(zone)


def _format_moment(milliseconds: int, zone: ZoneInfo) -> str:
    return f"{_in_zone(milliseconds, zone):%Y-%m-%d %H:%M}"


def _format_instant(milliseconds: int, zone: ZoneInfo) -> str:
    return f"{_in_zone(milliseconds, zone):%Y-%m-%d %H:%M:%S}.{milliseconds % 1000:03}"


def _format_span(minutes: int) -> str:
    """Return a number of minutes as people say it."""
    for length, name in ((1440, "day"), (60, "hour")):
        if minutes % length == 0 and minutes:
            number = minutes // length
            return f"{number} {name}s" if number > 1 else name
    return f"{minutes} minutes" if minutes != 1 else "minute"
