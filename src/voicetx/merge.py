"""Which update wins: the pure rules that make one transaction of updates that came in any order, any number of times.

Used by `voicetx.recording` between reading the rows of a batch and writing them back. No I/O, no clock, no database.
Source: docs/contract.md, section 5.
"""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from voicetx.contract import Position, Update

_NEVER_ANSWERED_STATES = frozenset({"1", "2", "3", "4"})
_ONLY_AFTER_ANSWER = frozenset({"2005"})
_ONLY_BEFORE_ANSWER = frozenset(
    {"1001", "1002", "1003", "1004", "1005", "1006", "1007", "2000", "2001", "2002", "2003"}
)


class Transaction(NamedTuple):
    """A transaction as its updates have made it.

    `fields` by Python name; `position` is the place of the newest update in the total order, None while nothing was
    reported; `updates` counts the different updates, repeats not among them.
    """

    transaction_id: str
    fields: Mapping[str, str] = MappingProxyType({})
    position: Position | None = None
    updates: int = 0

    @property
    def is_inconsistent(self) -> bool:
        """Say whether call-state and drop-code contradict each other (docs/decisions/0003-inconsistent.md)."""
        return contradicts(self.fields.get("call_state", ""), self.fields.get("drop_code", ""))


def contradicts(call_state: str, drop_code: str) -> bool:
    """Say whether a call that got as far as `call_state` can't have ended with `drop_code`."""
    if call_state in _NEVER_ANSWERED_STATES:
        return drop_code in _ONLY_AFTER_ANSWER
    return drop_code in _ONLY_BEFORE_ANSWER


def apply(transaction: Transaction, update: Update) -> Transaction | None:
    """Return the transaction with one more update, or None where only its whole history can tell (see `fold`).

    The update must not be a repeat. None is returned for an update of the shown attempt that came late and gives a
    field another value than the one shown: the update which gave that value may be older or newer than this one.
    """
    shown, position, updates = transaction.position, update.position, transaction.updates + 1
    if shown is None or position.attempt > shown.attempt:
        return Transaction(transaction.transaction_id, update.fields, position, updates)
    if position.attempt < shown.attempt:
        return Transaction(transaction.transaction_id, transaction.fields, shown, updates)
    if position > shown:
        return Transaction(transaction.transaction_id, {**transaction.fields, **update.fields}, position, updates)
    newest = transaction.fields
    if any(
        newest.get(name, value) != value for name, value in update.fields.items() if name not in _ALWAYS_FROM_NEWEST
    ):
        return None
    return Transaction(transaction.transaction_id, {**update.fields, **newest}, shown, updates)


_ALWAYS_FROM_NEWEST = frozenset({"call_starttime", "call_endtime", "call_source", "call_state", "drop_code"})


def fold(transaction_id: str, history: Iterable[Update]) -> Transaction:
    """Return the transaction that a whole history makes: the overlay, in order, of the newest attempt's updates.

    The history holds no repeats; its order is of no matter.
    """
    ordered = sorted(history, key=attrgetter("position"))
    if not ordered:
        return Transaction(transaction_id)
    newest = ordered[-1].position
    fields: dict[str, str] = {}
    for update in ordered:
        if update.position.attempt == newest.attempt:
            fields |= update.fields
    return Transaction(transaction_id, fields, newest, len(ordered))
