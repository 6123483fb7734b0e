"""Which update wins: the rules that merge updates into one transaction, in whatever order and how often they come.

`voicetx.recording.recorder` uses them between reading the rows of a batch and writing them back. Pure: no I/O, no
clock, no database. Source: docs/contract.md, section 5.
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

    `fields` are by Python name. `position` is the position of the newest update in the total order, None while nothing
    was reported. `updates` counts the different updates, without repeats. `older` has, for each field that the newest
    update did not give, the position of the update that gave it: so a late update can be merged without reading the
    history.
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
        """Say whether an update was reported and the call is over."""
        return self.position is not None and is_final(self.fields["call_state"], self.fields["drop_code"])


def apply(transaction: Transaction, update: Update) -> Transaction:
    """Return the transaction with one more update, which must not be a repeat.

    Whatever the order in which updates come, each field has the value from the last update that gave it, by position,
    among those of the newest attempt.
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
    """Return the transaction that results from a whole history, which is in any order and has no repeats."""
    return reduce(apply, sorted(history, key=attrgetter("position")), Transaction(transaction_id))
