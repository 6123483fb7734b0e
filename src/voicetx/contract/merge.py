"""Which update wins: the pure rules that make one transaction of updates that came in any order, any number of times.

Used by `voicetx.recording.recorder` between reading the rows of a batch and writing them back. No I/O, no clock, no
database. Source: docs/contract.md, section 5.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from voicetx.contract.codes import contradicts, is_final
from voicetx.contract.update import Position, Update


class Transaction(NamedTuple):
    """A transaction as its updates have made it.

    `fields` by Python name; `position` is the place of the newest update in the total order, None while nothing was
    reported; `updates` counts the different updates, repeats not among them. `older` has, for each field that the
    newest update did not give, the place of the one that gave it: so a late update finds its own without the history.
    """

    transaction_id: str
    fields: Mapping[str, str] = MappingProxyType({})
    position: Position | None = None
    updates: int = 0
    older: Mapping[str, Position] = MappingProxyType({})

    @property
    def is_inconsistent(self) -> bool:
        """Say whether call-state and drop-code contradict each other (docs/decisions/0003-inconsistent.md)."""
        return contradicts(self.fields.get("call_state", ""), self.fields.get("drop_code", ""))

    @property
    def is_finished(self) -> bool:
        """Say whether something was reported, and it says that the call is over."""
        return self.position is not None and is_final(self.fields["call_state"], self.fields["drop_code"])


def apply(transaction: Transaction, update: Update) -> Transaction:
    """Return the transaction with one more update, which must not be a repeat.

    Whatever the order in which updates come, each field shows what the last one of the newest attempt to give it gave.
    """
    shown, position, updates = transaction.position, update.position, transaction.updates + 1
    if shown is None or position.attempt > shown.attempt:
        return Transaction(transaction.transaction_id, update.fields, position, updates)
    if position.attempt < shown.attempt:
        return transaction._replace(updates=updates)
    if position > shown:
        fields = {**transaction.fields, **update.fields}
        older = {name: transaction.older.get(name, shown) for name in transaction.fields.keys() - update.fields.keys()}
        return Transaction(transaction.transaction_id, fields, position, updates, older)
    fields, older = dict(transaction.fields), dict(transaction.older)
    for name, value in update.fields.items():
        if name not in fields or position > older.get(name, shown):
            fields[name] = value
            older[name] = position
    return Transaction(transaction.transaction_id, fields, shown, updates, older)


def fold(transaction_id: str, history: Iterable[Update]) -> Transaction:
    """Return the transaction that a whole history makes; it holds no repeats, and its order is of no matter."""
    return reduce(apply, sorted(history, key=attrgetter("position")), Transaction(transaction_id))
