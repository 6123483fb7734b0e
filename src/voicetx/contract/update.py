"""The wire: what an update's body may hold, and `parse`, which makes an `Update` of it or says exactly why not.

First step of an update once its caller is let in: bytes come in here, an immutable `Update` goes on to
`voicetx.recording.recorder`. Here, and nowhere else, the hyphenated names of the wire become Python's. The module knows
neither HTTP nor the database. Source: docs/contract.md, sections 1 and 2.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from voicetx.contract.clocks import find_set_back, place_end
from voicetx.contract.codes import CALL_STATES, DROP_CODES, WireCallState, WireDropCode, list_choices
from voicetx.contract.json_text import read_object, strip_mark
from voicetx.contract.refusals import Fault, Refusal, Rejected

UPDATE_PATH = "/campaignapi/resources/v3/voicecampaigntransactions"
UPDATE_METHODS = ("PUT", "POST", "PATCH")

TROMBONE_SOURCE = "3"

_MOMENT = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]) ([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{3}$"
_MOMENT_RULE = "a real date and time written YYYY-MM-DD HH:MM:SS.SSS"


class Privacy(Enum):
    """What a field is to privacy: declared once, where the field is, and heeded wherever values are shown or forgotten.

    Source: docs/decisions/0013-what-is-hidden.md.
    """

    NOTHING = "a code, a count or a time: its rule lets it hold nothing about a person"
    IDENTITY = "the transaction's own id: never hidden and never changed"
    PARTY = "a person's number or address"
    KEYS = "keys that a person pressed"
    TEXT = "whatever somebody wrote"


@lru_cache(maxsize=1024)
def _is_real_date(text: str) -> bool:
    """Say whether YYYY-MM-DD names a day of the calendar; calls of one campaign share a few days."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _check_moment(text: str) -> str:
    if not _is_real_date(text[:10]):
        raise PydanticCustomError("not_a_date", "not a day of the calendar")
    return text


def _rule(rule: str, *, example: str, pattern: str | None = None, max_length: int | None = None) -> Any:
    """Describe a field by its rule; `errors` answers with the same words."""
    return Field(description=rule, examples=[example], pattern=pattern, max_length=max_length)


TransactionId = Annotated[
    str,
    Privacy.IDENTITY,
    _rule("1 to 128 visible ASCII characters", example="demo-001", pattern=r"^[\x21-\x7e]{1,128}$"),
]
Moment = Annotated[str, Privacy.NOTHING, _rule(_MOMENT_RULE, example="2014-08-26 08:00:58.211", pattern=_MOMENT)]


class _Body(BaseModel):
    """What every body keeps to: each of its fields says what it is to privacy, or the class is not made."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        undeclared = [name for name in cls.model_fields if len(_list_privacy(cls, name)) != 1]
        if undeclared:
            raise TypeError(f"{cls.__name__}: what are these to privacy? {', '.join(undeclared)}")


def _list_privacy(model: type[BaseModel], name: str) -> list[Privacy]:
    return [marker for marker in model.model_fields[name].metadata if isinstance(marker, Privacy)]


class UpdateBody(_Body):
    """The body of an update whose call is inbound (1) or outbound (2).

    Every value is a string, trimmed before its rule applies. A field that is absent, null or empty is not given.
    Fields that are not listed are accepted and kept in the history. Trombone times are not applicable here: accepted,
    kept in the history, not put on the transaction.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"),
        extra="allow",
        strict=True,
        frozen=True,
        json_schema_extra={
            "example": {
                "transaction-id": "demo-001",
                "call-starttime": "2014-08-26 08:00:58.211",
                "call-endtime": "2014-08-26 08:00:59.200",
                "call-source": "2",
                "call-state": "5",
                "drop-code": "2005",
                "dtmf-digits": "1",
                "message": "Call finished",
            }
        },
    )

    transaction_id: TransactionId
    call_starttime: Moment
    call_endtime: Moment
    call_source: Annotated[
        Literal["1", "2"],
        Privacy.NOTHING,
        _rule("1 (inbound), 2 (outbound) or 3 (trombone, a transferred call)", example="2"),
    ]
    trombone_starttime: Annotated[
        str | None,
        Privacy.NOTHING,
        Field(description="not applicable unless call-source is 3", examples=["2014-08-26 08:00:58.211"]),
    ] = None
    trombone_endtime: Annotated[
        str | None,
        Privacy.NOTHING,
        Field(description="not applicable unless call-source is 3", examples=["2014-08-26 08:00:59.211"]),
    ] = None
    dtmf_digits: Annotated[
        str | None,
        Privacy.KEYS,
        _rule("1 to 64 of the keys 0-9, *, # and A-D", example="1*3#", pattern=r"^[0-9*#A-D]{1,64}$"),
    ] = None
    voice_tag: Annotated[
        str | None, Privacy.TEXT, _rule("at most 128 characters", example="greeting-7", max_length=128)
    ] = None
    call_state: Annotated[WireCallState, Privacy.NOTHING, _rule(list_choices(CALL_STATES), example="5")]
    drop_code: Annotated[WireDropCode, Privacy.NOTHING, _rule(list_choices(DROP_CODES), example="2005")]
    drop_reason: Annotated[
        str | None, Privacy.TEXT, _rule("at most 1,024 characters", example="Normal clearing", max_length=1024)
    ] = None
    message: Annotated[
        str | None, Privacy.TEXT, _rule("at most 1,024 characters", example="Call finished", max_length=1024)
    ] = None
    voice_recorded: Annotated[Literal["Yes", "No"] | None, Privacy.NOTHING, _rule("Yes or No", example="Yes")] = None
    times_attempted: Annotated[
        str | None, Privacy.NOTHING, _rule("a whole number, 0 to 999", example="1", pattern=r"^[0-9]{1,3}$")
    ] = None
    a_party: Annotated[
        str | None, Privacy.PARTY, _rule("at most 64 characters", example="+15550100", max_length=64)
    ] = None
    b_party: Annotated[
        str | None, Privacy.PARTY, _rule("at most 64 characters", example="+15550199", max_length=64)
    ] = None

    @field_validator("call_starttime")
    @classmethod
    def _starts_on_a_real_day(cls, text: str) -> str:
        return _check_moment(text)

    @field_validator("call_endtime")
    @classmethod
    def _ends_after_its_start(cls, text: str, info: ValidationInfo) -> str:
        return _check_end(_check_moment(text), "call_starttime", info)


class TromboneBody(UpdateBody):
    """The body of an update whose call was transferred (call-source 3): the trombone times are mandatory."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "transaction-id": "demo-002",
                "call-starttime": "2014-08-26 08:00:58.211",
                "call-endtime": "2014-08-26 08:00:59.200",
                "call-source": "3",
                "trombone-starttime": "2014-08-26 08:00:58.211",
                "trombone-endtime": "2014-08-26 08:00:59.211",
                "call-state": "6",
                "drop-code": "2005",
                "message": "Call finished",
                "voice-recorded": "Yes",
            }
        }
    )

    call_source: Annotated[  # type: ignore[assignment]  # the other kind of body: no update is of both
        Literal["3"], Privacy.NOTHING, _rule("3 (trombone, a transferred call)", example="3")
    ]
    trombone_starttime: Moment
    trombone_endtime: Moment

    @field_validator("trombone_starttime")
    @classmethod
    def _trombone_starts_on_a_real_day(cls, text: str) -> str:
        return _check_moment(text)

    @field_validator("trombone_endtime")
    @classmethod
    def _trombone_ends_after_its_start(cls, text: str, info: ValidationInfo) -> str:
        return _check_end(_check_moment(text), "trombone_starttime", info)


def _check_end(end: str, start_name: str, info: ValidationInfo) -> str:
    start = info.data.get(start_name)
    if start is not None and end < start:
        raise PydanticCustomError("ends_before_start", "must not be before {start}", {"start": _wire(start_name)})
    return end


def _wire(name: str) -> str:
    return name.replace("_", "-")


WIRE_NAMES: Mapping[str, str] = {name: _wire(name) for name in UpdateBody.model_fields}
"""The fields of section 2 in the order of the contract: the name in Python and the one on the wire."""

_NAMES: Mapping[str, str] = {wire: name for name, wire in WIRE_NAMES.items()}
_TROMBONE_NAMES = frozenset({"trombone-starttime", "trombone-endtime"})
_START_NAMES = {"call-endtime": "call-starttime", "trombone-endtime": "trombone-starttime"}
_NAMES_WITHOUT_TROMBONE = {wire: name for wire, name in _NAMES.items() if wire not in _TROMBONE_NAMES}

PRIVACY: Mapping[str, Privacy] = {name: _list_privacy(UpdateBody, name)[0] for name in WIRE_NAMES}
"""What each field is to privacy, by its name in Python."""


class Position(NamedTuple):
    """The place of an update in the total order of contract section 5; `call_endtime` as `place_end` has it."""

    attempt: int
    call_endtime: str
    call_starttime: str
    call_state: int
    digest: bytes


class Update(NamedTuple):
    """One update that keeps every rule.

    `fields` are those that apply to the transaction, by Python name, trimmed, without the transaction id; with
    `set_back` (see `voicetx.contract.clocks`) where it ended before it began, for clocks were set back meanwhile.
    `digest` (16 bytes) is the same for two updates with the same fields and values after trimming, unknown ones
    included, whatever their order and spacing. `body` is the text as received, without a byte order mark.
    """

    transaction_id: str
    fields: Mapping[str, str]
    position: Position
    body: str

    @property
    def digest(self) -> bytes:
        """What tells a repeat from another update of the same transaction."""
        return self.position.digest


def parse(body: bytes, time_zone: str = "UTC") -> Update:
    """Make an update of a request's body, whose times are read in a time zone (an IANA name).

    Raises `Rejected` with code 1001, 1002 or 499, in this precedence, and with one fault for every field concerned, in
    body order, or one of no field where the body as a whole is at fault.
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
    """Make an update of a body that was accepted before, without judging it again.

    Where it ended in an hour that came twice, `set_back` gives it its place (see `voicetx.contract.clocks`).
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
    """Return the errors but for ends before a start between which clocks were set back, and how they were."""
    left: list[ErrorDetails] = []
    found: str | None = None
    for error in errors:
        set_back = None
        if error["type"] == "ends_before_start":
            end = str(error["loc"][0])
            set_back = find_set_back(given[_START_NAMES[end]], given[end], time_zone)
        found = found or set_back
        if set_back is None:
            left.append(error)
    return left, found


def _collect_given(raw: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the fields that are given, trimmed, and whether all of them are text.

    Raises `Rejected` (1001) where a field of the contract holds something else than a string.
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
        elif name in _NAMES:
            wrong.append(Fault(name, "must be a string"))
        else:
            given[name] = value
            has_only_text = False
    if wrong:
        raise Rejected(Refusal.INVALID_JSON, wrong)
    return given, has_only_text


def _build(given: Mapping[str, Any], body: bytes, set_back: str | None, *, has_only_text: bool) -> Update:
    text = body.decode()
    names = _NAMES if given["call-source"] == TROMBONE_SOURCE else _NAMES_WITHOUT_TROMBONE
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
    """Read a body with every number as the text that was sent: two numbers never look the same by rounding."""
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
    """Raise 1002 for what is missing or else 499 for what breaks a rule."""
    missing: list[Fault] = []
    faults: dict[str, Fault] = {}
    for error in errors:
        wire = str(error["loc"][0])
        if error["type"] == "missing":
            reason = "is mandatory when call-source is 3" if wire in _TROMBONE_NAMES else "is mandatory"
            missing.append(Fault(wire, reason))
        elif error["type"] == "ends_before_start":
            faults[wire] = Fault(wire, error["msg"])
        else:
            faults[wire] = Fault(wire, f"must be {_describe(wire)}")
    if missing:
        raise Rejected(Refusal.FIELD_MISSING, missing)
    faults.update((fault.field, fault) for fault in nul_faults)
    places = {name: place for place, name in enumerate(raw)}
    raise Rejected(Refusal.BAD_VALUE, sorted(faults.values(), key=lambda fault: places[fault.field]))


def _describe(wire: str) -> str:
    if wire in _TROMBONE_NAMES:
        return _MOMENT_RULE
    return str(UpdateBody.model_fields[_NAMES[wire]].description)
