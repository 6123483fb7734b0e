"""Call states and drop codes: the one table of what each means.

Everything that the service says or decides about a code comes from here: which codes an update may have, whether a call
is over, whether a state and a code contradict each other, and the words on pages and in reports. docs/contract.md has
the same table of drop codes, and a test compares the two. Source: docs/contract.md, sections 2 and 5.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple


class Meaning(StrEnum):
    """What a drop code means to the dialer and its campaign."""

    SUCCESS = "success"
    TRY_AGAIN = "try again later"
    NEVER_AGAIN = "never again"
    REFUSED = "refused by the person"
    LINE_FAULT = "fault of the line"
    UNKNOWN = "other"


class Timing(StrEnum):
    """When a call can end with a drop code."""

    BEFORE_ANSWER = "before"  # only if nobody answered the call
    AFTER_ANSWER = "after"  # only if somebody did
    ANY_TIME = "either"


class CallState(NamedTuple):
    """How far a call got, in words; whether a person answered it; and whether it may still be going on."""

    text: str
    is_answered: bool = False
    is_under_way: bool = False


class DropCode(NamedTuple):
    """How a call ended, in words; what that means; and whether it happens before or after an answer.

    A code without `is_end` is also reported during calls. Such a code means that the call is over only if the call
    state is not under way either.
    """

    text: str
    meaning: Meaning
    timing: Timing
    is_end: bool = True


CALL_STATES: Mapping[str, CallState] = {
    "1": CallState("expired or suspended"),
    "2": CallState("initiated or dialled", is_under_way=True),
    "3": CallState("alerting", is_under_way=True),
    "4": CallState("connecting", is_under_way=True),
    "5": CallState("answered or connected", is_answered=True),
    "6": CallState("trombone", is_answered=True),
}
"""The call states of the contract, in its order."""

DROP_CODES: Mapping[str, DropCode] = {
    "2005": DropCode("success", Meaning.SUCCESS, Timing.AFTER_ANSWER, is_end=False),
    "1001": DropCode("unobtainable", Meaning.NEVER_AGAIN, Timing.BEFORE_ANSWER),
    "1002": DropCode("busy line", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "1003": DropCode("not in service", Meaning.NEVER_AGAIN, Timing.BEFORE_ANSWER),
    "1004": DropCode("congestion", Meaning.LINE_FAULT, Timing.BEFORE_ANSWER),
    "1005": DropCode("switched off", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "1006": DropCode("out of reach", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "1007": DropCode("OBD timeout", Meaning.LINE_FAULT, Timing.BEFORE_ANSWER),
    "2000": DropCode("alerting timed out", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "2001": DropCode("rejected", Meaning.REFUSED, Timing.BEFORE_ANSWER),
    "2002": DropCode("no answer", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "2003": DropCode("subscriber busy", Meaning.TRY_AGAIN, Timing.BEFORE_ANSWER),
    "2004": DropCode("user disconnected (incomplete)", Meaning.REFUSED, Timing.ANY_TIME),
    "2006": DropCode("application reject (incomplete)", Meaning.LINE_FAULT, Timing.ANY_TIME),
    "2020": DropCode("other", Meaning.UNKNOWN, Timing.ANY_TIME, is_end=False),
}
"""The drop codes of the contract, in its order. The contract names the codes; their meanings are our decision."""

if TYPE_CHECKING:
    WireCallState = str
    WireDropCode = str
else:
    # Pydantic and typer read the choices from the tables; a type checker would need each choice written out again.
    WireCallState = Literal[tuple(CALL_STATES)]
    WireDropCode = Literal[tuple(DROP_CODES)]

# These are checked for every update that is recorded, so they are sets.
ANSWERED_STATES = frozenset(code for code, state in CALL_STATES.items() if state.is_answered)
"""The call states that mean a person answered."""

_UNDER_WAY_STATES = frozenset(code for code, state in CALL_STATES.items() if state.is_under_way)
_ENDS = frozenset(code for code, drop in DROP_CODES.items() if drop.is_end)
_ONLY_BEFORE_ANSWER = frozenset(code for code, drop in DROP_CODES.items() if drop.timing is Timing.BEFORE_ANSWER)
_ONLY_AFTER_ANSWER = frozenset(code for code, drop in DROP_CODES.items() if drop.timing is Timing.AFTER_ANSWER)


def is_final(call_state: str, drop_code: str) -> bool:
    """Say whether an update tells how a call ended.

    Every update has a drop-code, even one that is sent during the call. So a call that is being dialled, alerting or
    connecting is still under way if its drop code is "other" or "success".
    """
    return call_state not in _UNDER_WAY_STATES or drop_code in _ENDS


def contradicts(call_state: str, drop_code: str) -> bool:
    """Say whether a call that got as far as `call_state` can't have ended with `drop_code`.

    Source: docs/decisions/0003-inconsistent.md.
    """
    return drop_code in (_ONLY_BEFORE_ANSWER if call_state in ANSWERED_STATES else _ONLY_AFTER_ANSWER)


def list_choices(codes: Mapping[str, CallState] | Mapping[str, DropCode]) -> str:
    """Return the codes of a table with their words as one rule: 1 (expired or suspended), ... or 6 (trombone)."""
    *first, last = (f"{code} ({_drop_brackets(row.text)})" for code, row in codes.items())
    return f"{', '.join(first)} or {last}"


def _drop_brackets(text: str) -> str:
    return text.replace(" (", ", ").removesuffix(")")
