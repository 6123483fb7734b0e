"""The fields of an update: what each may hold, how personal it is, and what it is called.

Fields are declared in `UpdateBody` and nowhere else. Everything that needs to know them reads them from here: the
checks of `voicetx.contract.update`, the columns of `voicetx.storage.schema`, what is hidden or erased, exports, pages
and the OpenAPI document. CONTRIBUTING.md says how to add a field. Source: docs/contract.md, section 2.
"""

from collections.abc import Mapping
from datetime import date
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from voicetx.contract.codes import CALL_STATES, DROP_CODES, WireCallState, WireDropCode, list_choices
from voicetx.contract.ids import TransactionId

TROMBONE_SOURCE = "3"
"""The call-source of a transferred call, whose trombone times are mandatory."""

_MOMENT = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]) ([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{3}$"
_MOMENT_RULE = "a real date and time written YYYY-MM-DD HH:MM:SS.SSS"


class Privacy(Enum):
    """How personal a field is. It is declared with the field, and followed wherever values are shown or erased.

    Source: docs/decisions/0013-what-is-hidden.md.
    """

    NOTHING = "a code, a count or a time: its rule lets it hold nothing about a person"
    IDENTITY = "the transaction's own id: never hidden and never changed"
    PARTY = "a person's number or address"
    KEYS = "keys that a person pressed"
    TEXT = "whatever somebody wrote"


@lru_cache(maxsize=1024)
def _is_real_date(text: str) -> bool:
    """Say whether YYYY-MM-DD is a day of the calendar. Cached, since the calls of a campaign share a few days."""
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
    """Describe a field by its rule; the `errors` of an answer use the same words."""
    return Field(description=rule, examples=[example], pattern=pattern, max_length=max_length)


Moment = Annotated[str, Privacy.NOTHING, _rule(_MOMENT_RULE, example="2014-08-26 08:00:58.211", pattern=_MOMENT)]


class _Body(BaseModel):
    """A body whose fields all declare their `Privacy`: defining a class with a field that does not raises TypeError."""

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

    transaction_id: Annotated[TransactionId, Privacy.IDENTITY]
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
"""The fields of section 2 in the order of the contract: from the name in Python to the name on the wire."""

PYTHON_NAMES: Mapping[str, str] = {wire: name for name, wire in WIRE_NAMES.items()}
"""The same fields, from the name on the wire to the name in Python."""

TROMBONE_NAMES = frozenset({"trombone-starttime", "trombone-endtime"})
"""The wire names of the fields that only apply to transferred calls."""

START_NAMES: Mapping[str, str] = {"call-endtime": "call-starttime", "trombone-endtime": "trombone-starttime"}
"""For the wire name of each end, the wire name of its start."""

PRIVACY: Mapping[str, Privacy] = {name: _list_privacy(UpdateBody, name)[0] for name in WIRE_NAMES}
"""How personal each field is, by its name in Python."""


def describe_rule(wire: str) -> str:
    """Return what a field, given by its wire name, may hold, such as "at most 128 characters"."""
    if wire in TROMBONE_NAMES:
        return _MOMENT_RULE
    return str(UpdateBody.model_fields[PYTHON_NAMES[wire]].description)
