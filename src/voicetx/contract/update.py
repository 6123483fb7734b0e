"""An update: `parse` turns a request's body into an `Update`, or says exactly why it can't.

This is the first step once the caller is let in: the bytes of a body become an immutable `Update`, which goes on to
`voicetx.recording.recorder`. What each field may hold is declared in `voicetx.contract.fields`. Only here do the
hyphenated names of the wire become Python names. Pure. Source: docs/contract.md, sections 1 and 2.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from voicetx.contract.clocks import find_set_back, place_end
from voicetx.contract.fields import (
    PYTHON_NAMES,
    START_NAMES,
    TROMBONE_NAMES,
    TROMBONE_SOURCE,
    TromboneBody,
    UpdateBody,
    describe_rule,
)
from voicetx.contract.json_text import read_object, strip_mark
from voicetx.contract.refusals import Fault, Refusal, Rejected

UPDATE_PATH = "/campaignapi/resources/v3/voicecampaigntransactions"
UPDATE_METHODS = ("PUT", "POST", "PATCH")

_NAMES_WITHOUT_TROMBONE = {wire: name for wire, name in PYTHON_NAMES.items() if wire not in TROMBONE_NAMES}


class Position(NamedTuple):
    """The position of an update in the total order of contract section 5; `place_end` makes its `call_endtime`."""

    attempt: int
    call_endtime: str
    call_starttime: str
    call_state: int
    digest: bytes


class Update(NamedTuple):
    """One update that keeps every rule.

    `fields` are those that apply to the transaction, by Python name, trimmed, without the transaction id. They include
    `set_back` (see `voicetx.contract.clocks`) if clocks were set back during the call. `digest` (16 bytes) is the same
    for two updates that have the same fields and values after trimming, whatever their order and spacing; fields that
    the contract does not list count too. `body` is the text as received, without a byte order mark.
    """

    transaction_id: str
    fields: Mapping[str, str]
    position: Position
    body: str

    @property
    def digest(self) -> bytes:
        """The digest, by which a repeat is told from another update of the same transaction."""
        return self.position.digest


def parse(body: bytes, time_zone: str = "UTC") -> Update:
    """Turn a request's body into an update; its times are read in a time zone (an IANA name).

    Raises `Rejected` with code 1001, 1002 or 499, in this order of precedence, with one fault for each field concerned,
    in body order. If the body as a whole is at fault, there is one fault, which names no field.
    """
    body = strip_mark(body)
    raw = read_object(body)
    given, has_only_text = _collect_given(raw)
    model = TromboneBody if given.get("call-source") == TROMBONE_SOURCE else UpdateBody
    nul_faults = _find_nul(raw) if b"\\u0000" in body else []
    set_back = None
    try:
        _VALIDATORS[model](given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        errors, set_back = _excuse(found, given, time_zone)
        if errors:
            _reject(errors, nul_faults, raw)
    if nul_faults:
        _reject([], nul_faults, raw)
    return _build(given, body, set_back, has_only_text=has_only_text)


def restore(body: str, set_back: str | None = None) -> Update:
    """Turn a body that was accepted before into an update, without checking it again.

    `set_back` is needed for its position if clocks were set back during the call (see `voicetx.contract.clocks`).
    """
    encoded = body.encode()
    given, has_only_text = _collect_given(from_json(encoded))
    return _build(given, encoded, set_back, has_only_text=has_only_text)


_VALIDATORS: Mapping[type[UpdateBody], Callable[[Any], Any]] = {
    model: TypeAdapter(model).validator.validate_python for model in (UpdateBody, TromboneBody)
}


def _excuse(
    errors: Iterable[ErrorDetails], given: Mapping[str, Any], time_zone: str
) -> tuple[list[ErrorDetails], str | None]:
    """Drop the errors about ends that only look too early because clocks were set back.

    Return the other errors, and how clocks were set back, or None.
    """
    left: list[ErrorDetails] = []
    found: str | None = None
    for error in errors:
        set_back = None
        if error["type"] == "ends_before_start":
            end = str(error["loc"][0])
            set_back = find_set_back(given[START_NAMES[end]], given[end], time_zone)
        found = found or set_back
        if set_back is None:
            left.append(error)
    return left, found


def _collect_given(raw: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the fields that are given, trimmed, and whether all of them are strings.

    Raises `Rejected` (1001) if a field of the contract holds anything but a string.
    """
    given: dict[str, Any] = {}
    has_only_text = True
    wrong: list[Fault] = []
    for name, value in raw.items():
        if type(value) is str:
            text = value.strip()
            if text:
                given[name] = text
        elif value is None:
            continue
        elif name in PYTHON_NAMES:
            wrong.append(Fault(name, "must be a string"))
        else:
            given[name] = value
            has_only_text = False
    if wrong:
        raise Rejected(Refusal.INVALID_JSON, wrong)
    return given, has_only_text


def _build(given: Mapping[str, Any], body: bytes, set_back: str | None, *, has_only_text: bool) -> Update:
    text = body.decode()
    names = PYTHON_NAMES if given["call-source"] == TROMBONE_SOURCE else _NAMES_WITHOUT_TROMBONE
    fields = {names[wire]: value for wire, value in given.items() if wire in names}
    position = Position(
        int(fields.get("times_attempted", "0")),
        place_end(fields["call_starttime"], fields["call_endtime"], set_back),
        fields["call_starttime"],
        int(fields["call_state"]),
        _digest(given if has_only_text else _collect_given(_read_exactly(text))[0]),
    )
    if set_back is not None:
        fields["set_back"] = set_back
    return Update(fields.pop("transaction_id"), fields, position, text)


def _digest(given: Mapping[str, Any]) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the given fields as JSON: names sorted, no spaces, UTF-8."""
    return hashlib.sha256(orjson.dumps(given, option=orjson.OPT_SORT_KEYS)).digest()[:16]


def _read_exactly(body: str) -> dict[str, Any]:
    """Read a body, keeping every number as the text that was sent, so that rounding never makes two numbers equal."""
    raw: dict[str, Any] = json.loads(body, parse_int=_keep_number, parse_float=_keep_number)
    return raw


def _keep_number(text: str) -> dict[str, str]:
    return {"\0": text}  # no body can hold this: NUL is refused


def _find_nul(raw: Mapping[str, Any]) -> list[Fault]:
    return [
        Fault(name, "must not contain the character NUL")
        for name, value in raw.items()
        if _holds_nul(name) or _holds_nul(value)
    ]


def _holds_nul(value: Any) -> bool:
    match value:
        case str():
            return "\0" in value
        case dict():
            return any(_holds_nul(name) or _holds_nul(inner) for name, inner in value.items())
        case list():
            return any(_holds_nul(inner) for inner in value)
        case _:
            return False


def _reject(errors: Iterable[ErrorDetails], nul_faults: Iterable[Fault], raw: Mapping[str, Any]) -> NoReturn:
    """Raise 1002 if fields are missing, else 499 for the fields that break a rule."""
    missing: list[Fault] = []
    faults: dict[str, Fault] = {}
    for error in errors:
        wire = str(error["loc"][0])
        if error["type"] == "missing":
            reason = "is mandatory when call-source is 3" if wire in TROMBONE_NAMES else "is mandatory"
            missing.append(Fault(wire, reason))
        elif error["type"] == "ends_before_start":
            faults[wire] = Fault(wire, error["msg"])
        else:
            faults[wire] = Fault(wire, f"must be {describe_rule(wire)}")
    if missing:
        raise Rejected(Refusal.FIELD_MISSING, missing)
    faults.update((fault.field, fault) for fault in nul_faults)
    places = {name: place for place, name in enumerate(raw)}
    raise Rejected(Refusal.BAD_VALUE, sorted(faults.values(), key=lambda fault: places[fault.field]))
