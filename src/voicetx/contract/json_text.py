"""Read JSON (RFC 8259) from the bytes of a body, or refuse it (1001) with the reason and the place.

A reason never quotes what was sent: only those of the parser's messages that are listed here are passed on, each in
our own words. Source: docs/contract.md, section 2.
"""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from typing import Any

from pydantic_core import from_json

from voicetx.contract.refusals import Fault, Refusal, Rejected

_GZIP = b"\x1f\x8b"
_OTHER_MARKS = (
    (BOM_UTF32_LE, "UTF-32"),  # has to come before UTF-16's mark, because it begins with the same bytes
    (BOM_UTF32_BE, "UTF-32"),
    (BOM_UTF16_LE, "UTF-16"),
    (BOM_UTF16_BE, "UTF-16"),
)
_WHITE_SPACE = b" \t\r\n"  # RFC 8259, section 2

_PLACED = re.compile(r"(.+) at line (\d+) column (\d+)", re.DOTALL)
_MET = {
    "EOF while parsing a list": "cut off within an array",
    "EOF while parsing an object": "cut off within an object",
    "EOF while parsing a string": "cut off within a string",
    "EOF while parsing a value": "cut off where a value is due",
    "unexpected end of hex escape": "a lone surrogate",
    "expected `:`": "no colon after a name",
    "expected `,` or `]`": "no comma or bracket after a value",
    "expected `,` or `}`": "no comma or brace after a value",
    "expected ident": "no value",
    "expected value": "no value",
    "invalid escape": "an unknown escape",
    "invalid number": "a number that is none",
    "number out of range": "a number out of range",
    "control character (\\u0000-\\u001F) found while parsing a string": "a control character in a string",
    "key must be a string": "a name that is not in double quotes",
    "lone leading surrogate in hex escape": "a lone surrogate",
    "trailing comma": "trailing comma",
    "trailing characters": "text after its end",
    "recursion limit exceeded": "nested too deeply",
}
_KINDS = {list: "an array", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}


def strip_mark(body: bytes) -> bytes:
    """Return a body without the UTF-8 byte order mark at its start, which may be ignored (RFC 8259, section 8.1)."""
    return body.removeprefix(BOM_UTF8)


def read_json(body: bytes) -> Any:
    """Return what a body holds. Raises `Rejected` (1001) if it is not JSON."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise refuse_json(_explain(body, str(error))) from None


def read_object(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds. Raises `Rejected` (1001) if it holds anything else."""
    raw = read_json(body)
    if type(raw) is not dict:
        raise refuse_kind(raw, "an object")
    return raw


def refuse_kind(raw: Any, wanted: str) -> Rejected:
    """Return the refusal of a body that holds another kind of JSON than the one wanted."""
    return refuse_json(f"must be {wanted}, not {_KINDS.get(type(raw), 'a number')}")


def refuse_json(reason: str) -> Rejected:
    """Return the refusal of a body as a whole, with a fault that names no field."""
    return Rejected(Refusal.INVALID_JSON, [Fault("", reason)])


def _explain(body: bytes, error: str) -> str:
    if not body.strip(_WHITE_SPACE):
        return "must not be empty"
    if body.startswith(_GZIP):
        return "must not be compressed"
    encoding = next((name for mark, name in _OTHER_MARKS if body.startswith(mark)), None)
    if encoding is not None:
        return f"must be UTF-8, not {encoding}"
    try:
        body.decode()
    except UnicodeDecodeError as undecoded:
        return f"must be UTF-8: byte {undecoded.start + 1} is not"
    placed = _PLACED.fullmatch(error)
    if placed is None or placed[1] not in _MET:
        return "must be JSON"
    line, column = int(placed[2]), int(placed[3])
    if column == 0:  # the parser counts a line break as column 0 of the next line; we call it the end of its own line
        line -= 1
        column = len(body.split(b"\n", line)[line - 1]) + 1
    return f"must be JSON: {_MET[placed[1]]} at line {line}, column {column}"
