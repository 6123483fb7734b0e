"""Lists of transactions: of a deployment, by what became of them, those whose outcome is missing; and receipts.

Read-only, in pages that follow each other by transaction id: an id never changes, so nothing is shown twice or left out
while updates come in. However rare what is asked for, a page looks at a bounded number of rows, so no list runs into a
time-out: it may hold fewer rows than were asked for, or none, and there is more as long as `next` says so. Knows
nothing of who asks.
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
    """What is wanted; None leaves a condition out.

    `updated_since_ms` takes those of which something was recorded at that instant or later, or that the deployment took
    over then with what was recorded before; `unheard_since_ms` those of which nothing was, before that instant they
    were registered. `number` takes those with a party of these digits.
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
    """A transaction in a list; `fields` by their wire names, those only that were given."""

    transaction_id: str
    fields: Mapping[str, str]
    is_inconsistent: bool
    is_finished: bool
    updates: int
    registered_at_ms: int
    updated_at_ms: int | None


class Page(NamedTuple):
    """Some of a list, and the id after which it goes on; None at its end."""

    rows: Sequence[ListedTransaction]
    next: str | None


class Receipt(NamedTuple):
    """What is on disk of a transaction: whether it is registered, its updates, and whether what was asked is held."""

    transaction_id: str
    is_registered: bool
    updates: int
    is_held: bool


ANYTHING = Filters()


def match_missing(unheard_ms: int) -> Filters:
    """Return what finds the transactions whose outcome is missing and of which nothing was heard for so long."""
    return Filters(is_finished=False, unheard_since_ms=time.time_ns() // 1_000_000 - unheard_ms)


def list_transactions(
    connection: Connection, deployment_id: str, filters: Filters = ANYTHING, *, after: str = "", limit: int
) -> Page:
    """Return the transactions of a deployment that come after an id, in the order of their ids, at most `limit`."""
    belongs = [_columns.deployment_id == deployment_id, _columns.transaction_id > after]
    if filters.is_finished is False or filters.is_reported is False:
        belongs.append(~_columns.finished)  # those have an index of their own
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
    """Return a receipt for each id, in order: with a digest whether that update is held, else whether any is."""
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
        # Whatever stands between the digits; which number it is, is seen afterwards.
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
