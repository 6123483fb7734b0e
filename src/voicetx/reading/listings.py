"""Lists of transactions: those of a deployment, by what became of them or with a missing outcome; and receipts.

Read-only. Pages follow each other by transaction id: an id never changes, so nothing is shown twice or left out while
updates come in. A page looks at a bounded number of rows, so no list times out, however rare the transactions it
looks for. So a page may have fewer rows than asked for, or none, and there are more pages as long as `next` is set.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, or_, select, true

from voicetx.contract import privacy
from voicetx.contract.fields import PRIVACY, WIRE_NAMES, Privacy
from voicetx.storage import statements
from voicetx.storage.schema import FIELD_NAMES, deployment, voice_transaction

MOST_SCANNED = 20_000
"""How many rows a page looks at."""

_columns = voice_transaction.c
_PARTIES = tuple(name for name, privacy in PRIVACY.items() if privacy is Privacy.PARTY)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which transactions to list; a filter that is None is left out.

    `updated_since_ms` finds those that had an update recorded at that instant or later, or that the deployment took
    over then together with earlier updates. `unheard_since_ms` finds those whose last update was recorded before that
    instant, or whose registration was, if they have no update. `number` finds those with a party of these digits.
    """

    call_state: str | None = None
    drop_code: str | None = None
    is_reported: bool | None = None
    is_finished: bool | None = None
    is_inconsistent: bool | None = None
    updated_since_ms: int | None = None
    unheard_since_ms: int | None = None
    number: str | None = None


@dataclass(frozen=True, slots=True)
class ListedTransaction:
    """A transaction in a list; `fields` has the fields that were given, by their wire names."""

    transaction_id: str
    fields: Mapping[str, str]
    is_inconsistent: bool
    is_finished: bool
    updates: int
    registered_at_ms: int
    updated_at_ms: int | None


class Page(NamedTuple):
    """A part of a list, and the id after which the list goes on; None at its end."""

    rows: Sequence[ListedTransaction]
    next: str | None


class Receipt(NamedTuple):
    """What is on disk of a transaction: whether it is registered, its updates, and whether the update asked for is."""

    transaction_id: str
    is_registered: bool
    updates: int
    is_held: bool


ANYTHING = Filters()


def match_missing(unheard_ms: int) -> Filters:
    """Return filters for transactions without an outcome that had no update for at least `unheard_ms`."""
    return Filters(is_finished=False, unheard_since_ms=time.time_ns() // 1_000_000 - unheard_ms)


def list_transactions(
    connection: Connection, deployment_id: str, filters: Filters = ANYTHING, *, after: str = "", limit: int
) -> Page:
    """Return at most `limit` transactions of a deployment, in the order of their ids, beginning after an id."""
    belongs = [_columns.deployment_id == deployment_id, _columns.transaction_id > after]
    if filters.is_finished is False or filters.is_reported is False:
        belongs.append(~_columns.finished)  # unfinished transactions have an index of their own
    order = _columns.transaction_id
    looked_at = select(order).where(*belongs).order_by(order).limit(MOST_SCANNED).subquery()
    last, count = connection.execute(select(func.max(looked_at.c.transaction_id), func.count())).one()
    if last is None:
        return Page((), None)
    made_at_ms = select(deployment.c.created_at_ms).where(deployment.c.deployment_id == deployment_id).scalar_subquery()
    registered_at_ms = func.coalesce(_columns.registered_at_ms, made_at_ms)
    wanted = (
        select(voice_transaction, registered_at_ms.label("since_ms"))
        .where(*belongs, order <= last, *_match(filters, registered_at_ms))
        .order_by(order)
        .limit(limit)
    )
    found = connection.execute(wanted).mappings().all()
    rows = [_to_listed(row) for row in found if _has_number(row, filters.number)]
    if len(found) == limit:
        return Page(rows, found[-1]["transaction_id"])
    return Page(rows, last if count == MOST_SCANNED else None)


def find_receipts(connection: Connection, wanted: Sequence[tuple[str, bytes | None]]) -> list[Receipt]:
    """Return a receipt for each id, in order.

    With a digest, a receipt says whether that update is on disk; without one, whether any update is.
    """
    digests: dict[str, set[bytes]] = {}
    for transaction_id, digest in wanted:
        digests.setdefault(transaction_id, set()).add(digest if digest is not None else b"")
    found = statements.look_up(connection, digests)
    receipts: list[Receipt] = []
    for transaction_id, digest in wanted:
        known = found.get(transaction_id)
        if known is None:
            receipts.append(Receipt(transaction_id, is_registered=False, updates=0, is_held=False))
            continue
        updates = known.updates
        is_held = updates > 0 if digest is None else digest in known.held
        receipts.append(Receipt(transaction_id, is_registered=True, updates=updates, is_held=is_held))
    return receipts


def _match(filters: Filters, registered_at_ms: ColumnElement[int]) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [true()]
    if filters.call_state is not None:
        conditions.append(_columns.call_state == filters.call_state)
    if filters.drop_code is not None:
        conditions.append(_columns.drop_code == filters.drop_code)
    if filters.is_reported is not None:
        conditions.append(_columns.attempt.is_not(None) if filters.is_reported else _columns.attempt.is_(None))
    if filters.is_finished is not None:
        conditions.append(_columns.finished if filters.is_finished else ~_columns.finished)
    if filters.is_inconsistent is not None:
        conditions.append(_columns.inconsistent if filters.is_inconsistent else ~_columns.inconsistent)
    if filters.updated_since_ms is not None:
        latest = or_(
            _columns.updated_at_ms >= filters.updated_since_ms, _columns.registered_at_ms >= filters.updated_since_ms
        )
        conditions += [_columns.updated_at_ms.is_not(None), latest]
    if filters.unheard_since_ms is not None:
        conditions.append(func.coalesce(_columns.updated_at_ms, registered_at_ms) < filters.unheard_since_ms)
    if filters.number is not None:
        # This allows anything between the digits; whether it is this number is checked afterwards.
        pattern = "%" + "%".join(filters.number) + "%"
        conditions.append(or_(*(_columns[name].like(pattern) for name in _PARTIES)))
    return conditions


def _has_number(row: Mapping[Any, Any], number: str | None) -> bool:
    if number is None:
        return True
    parties = (row[name] for name in _PARTIES)
    return any(party is not None and privacy.forget_in_text(number, party) != party for party in parties)


def _to_listed(row: Mapping[Any, Any]) -> ListedTransaction:
    return ListedTransaction(
        transaction_id=row["transaction_id"],
        fields={WIRE_NAMES[name]: row[name] for name in FIELD_NAMES if row[name] is not None},
        is_inconsistent=row["inconsistent"],
        is_finished=row["finished"],
        updates=row["updates"],
        registered_at_ms=row["since_ms"],
        updated_at_ms=row["updated_at_ms"],
    )
