"""Bodies of updates that tests send: a whole one, variations of it, and every way to break a rule."""

import json
from typing import Any

from hypothesis import strategies as st

from voicetx.contract.fields import PRIVACY, WIRE_NAMES, Privacy

GONE = object()
"""As a value: leave the field out."""


def make_body(transaction_id: str = "tx-1", **fields: Any) -> dict[str, Any]:
    """Return a whole body; `fields` by Python name replace, add or (GONE) remove."""
    body = {
        "transaction_id": transaction_id,
        "call_starttime": "2026-03-01 09:00:00.000",
        "call_endtime": "2026-03-01 09:01:00.000",
        "call_source": "2",
        "call_state": "5",
        "drop_code": "2005",
    } | fields
    return {name.replace("_", "-"): value for name, value in body.items() if value is not GONE}


PRIVATE: set[str] = set()
"""What was encoded of persons: no log may hold it (conftest.py). Short values are left out: they are found anywhere."""

_PRIVATE_FIELDS = [
    WIRE_NAMES[name] for name, privacy in PRIVACY.items() if privacy not in {Privacy.NOTHING, Privacy.IDENTITY}
]


def encode(body: Any) -> bytes:
    """Return JSON as a client sends it."""
    if isinstance(body, dict):
        values = (body.get(name) for name in _PRIVATE_FIELDS)
        PRIVATE.update(value for value in values if isinstance(value, str) and len(value.strip()) >= 7)
    return json.dumps(body).encode()


TROMBONE = {
    "call_source": "3",
    "trombone_starttime": "2026-03-01 09:00:30.000",
    "trombone_endtime": "2026-03-01 09:00:50.000",
}

_MOMENTS = [f"2026-03-01 09:0{minute}:00.000" for minute in range(4)]


@st.composite
def updates_of(draw: st.DrawFn, transaction_id: str = "tx-1") -> dict[str, Any]:
    """Draw a body that keeps every rule, from few values, so that updates collide in every part of their order."""
    start = draw(st.sampled_from(_MOMENTS[:3]))
    end = draw(st.sampled_from([moment for moment in _MOMENTS if moment >= start]))
    body = make_body(
        transaction_id,
        call_starttime=start,
        call_endtime=end,
        call_state=draw(st.sampled_from("123456")),
        drop_code=draw(st.sampled_from(["2005", "1002", "2002"])),
    )
    if draw(st.booleans()):
        body |= {name.replace("_", "-"): value for name, value in TROMBONE.items()}
    optional = {
        "times-attempted": ["0", "1", "01", "2"],
        "message": ["a", "b", "c"],
        "dtmf-digits": ["1", "2#"],
        "voice-tag": ["x", "y"],
        "b-party": ["+1", "+2"],
        "unknown": ["p", "q"],
    }
    for name, values in optional.items():
        value = draw(st.one_of(st.none(), st.sampled_from(values)))
        if value is not None:
            body[name] = value
    return body
