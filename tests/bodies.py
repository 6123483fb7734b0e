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


GOOD_VALUES = [
    ("transaction-id", "!~"),
    ("transaction-id", "x" * 128),
    ("call-starttime", "2024-02-29 00:00:00.000"),
    ("call-endtime", "2026-03-01 09:00:00.000"),
    *(("call-source", value) for value in "12"),
    *(("call-state", value) for value in "123456"),
    *(("drop-code", str(value)) for value in [2005, *range(1001, 1008), *range(2000, 2005), 2006, 2020]),
    ("dtmf-digits", "0123456789*#ABCD"),
    ("dtmf-digits", "1" * 64),
    ("voice-tag", "é" * 128),
    ("drop-reason", "x" * 1024),
    ("message", "line one\nline two"),
    ("message", "😀" * 1024),
    ("voice-recorded", "Yes"),
    ("voice-recorded", "No"),
    ("times-attempted", "0"),
    ("times-attempted", "999"),
    ("a-party", "sip:someone@example.com"),
    ("b-party", "+" + "1" * 63),
]


BAD_VALUES = [
    ("transaction-id", "two words"),
    ("transaction-id", "x" * 129),
    ("transaction-id", "é"),
    ("call-starttime", "2026-02-30 09:00:00.000"),
    ("call-starttime", "2026-13-01 09:00:00.000"),
    ("call-starttime", "2025-02-29 09:00:00.000"),
    ("call-starttime", "0000-01-01 09:00:00.000"),
    ("call-starttime", "2026-03-01 24:00:00.000"),
    ("call-starttime", "2026-03-01 09:60:00.000"),
    ("call-starttime", "2026-03-01 08:59:60.000"),
    ("call-starttime", "2026-03-01T09:00:00.000"),
    ("call-starttime", "2026-03-01 09:00:00.00"),
    ("call-starttime", "2026-03-01 09:00:00.0000"),
    ("call-starttime", "2026-03-01 09:00:00"),
    ("call-starttime", "2026-3-1 09:00:00.000"),
    ("call-starttime", "٢٠٢٦-03-01 09:00:00.000"),
    ("call-endtime", "2026-03-01 08:59:59.999"),
    ("call-source", "0"),
    ("call-source", "4"),
    ("call-source", "2.0"),
    ("call-state", "0"),
    ("call-state", "7"),
    ("drop-code", "2999"),
    ("drop-code", "200"),
    ("dtmf-digits", "12a"),
    ("dtmf-digits", "E"),
    ("dtmf-digits", "1" * 65),
    ("voice-tag", "x" * 129),
    ("drop-reason", "x" * 1025),
    ("message", "x" * 1025),
    ("message", "a\0b"),
    ("voice-recorded", "yes"),
    ("voice-recorded", "true"),
    ("times-attempted", "1000"),
    ("times-attempted", "-1"),
    ("times-attempted", "1.0"),
    ("times-attempted", "\u0661"),
    ("a-party", "1" * 65),
    ("b-party", "1" * 65),
    ("unknown", "a\0b"),
    ("unknown", {"deep": [{"er": "a\0b"}]}),
    ("unknown", {"na\0me": 1}),
    ("na\0me", "x"),
    ("na\0me", None),
    ("na\0me", "  "),
]


NOT_JSON = [
    b"",
    b" ",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b"{} x",
    b"{'a': 1}",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 01}',
    b'{"a": 1,}',
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\\ud800"}',
    b'{"a": "\\udc00\\ud800"}',
    b'{"\\ud800": 1}',
    b'{"a": "\x01"}',
    b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}',
    b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b"// comment\n{}",
    encode(make_body()).replace(b"{", b"{'", 1),
    encode(make_body())[:-1],
    encode(make_body()).decode().encode("utf-16"),
]
