"""Erase: a person's number is masked in every transaction and update; the rows, counts, codes and times stay.

Called by the command line, beside services that write. It walks the tables by their keys, some rows at a time, and
writes in small transactions with a pause after each, so that updates get their turn. What is masked stays masked where
a run is stopped. Source: docs/decisions/0014-purge-and-erase.md.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, literal, select, tuple_, update

from voicetx.campaigns.audit import Advance, AuditedRun
from voicetx.contract import privacy
from voicetx.contract.fields import PRIVACY, Privacy
from voicetx.counting import tallies
from voicetx.counting.tallies import ERASED_KEY
from voicetx.storage.schema import FIELD_NAMES, voice_transaction, voice_update
from voicetx.storage.store import Store

_TRANSACTIONS_AT_ONCE = 1_000
_BODIES_AT_ONCE = 500
_MOST_PASSES = 10
_TEXT_FIELDS = tuple(name for name in FIELD_NAMES if PRIVACY[name] is not Privacy.NOTHING)
"""The fields that may hold a number."""


class StillReported(Exception):  # noqa: N818 - a state of the world, named as one
    """The number came back each time it was masked: somebody keeps reporting it."""


@dataclass(frozen=True, slots=True)
class Erased:
    """In how many transactions and updates a number was masked, or would be, and how many passes it took.

    `kept_ids` counts the transaction ids that hold the number: an id is never changed.
    """

    transactions: int = 0
    updates: int = 0
    passes: int = 0
    kept_ids: int = 0


async def erase_number(
    store: Store, digits: str, *, settle_seconds: float, is_dry_run: bool = False, advance: Advance
) -> Erased:
    """Mask a number, given by its digits, in every transaction and update; return how many held it.

    A service that read a transaction just before it was masked may write the number back. So after each pass that found
    something this waits for `settle_seconds`, the longest that such a write may take, and looks through everything
    again, until a pass finds nothing. May be stopped and run again. Raises `StillReported` where that never happens,
    and what `Store` raises.
    """
    run = await AuditedRun.begin(
        store, "erase", {"number_digest": privacy.digest_number(digits)}, is_dry_run=is_dry_run
    )
    for number in range(1, _MOST_PASSES + 1):
        run.counts.update(passes=1)
        has_found = False
        async for maskings in _find_number(run, store, digits, is_first_pass=number == 1, advance=advance):
            has_found = True
            if is_dry_run:
                run.counts.update(masking.kind for masking in maskings)
            else:
                await run.write(partial(_mask, maskings=maskings))
        if is_dry_run or not has_found:
            await run.end()
            return Erased(**run.counts)
        if (
            not store.is_embedded
        ):  # SQLite has one writer, and nobody else writes between what that reads and what it writes
            await asyncio.sleep(settle_seconds)
    raise StillReported


class _Masking(NamedTuple):
    """A row that holds the number: its table, its key, and the columns to mask, as they are and as they are to be."""

    table: Table
    key: Mapping[str, Any]
    held: Mapping[str, str]
    masked: Mapping[str, str]

    @property
    def kind(self) -> str:
        """Which count of `Erased` this row adds to."""
        return "transactions" if self.table is voice_transaction else "updates"


def _mask(connection: Connection, maskings: Sequence[_Masking]) -> Counter[str]:
    """Mask rows, except those that were changed since they were read: the next pass looks at those again."""
    counts: Counter[str] = Counter()
    for masking in maskings:
        columns = masking.table.c
        unchanged = [columns[name] == value for name, value in {**masking.key, **masking.held}.items()]
        masked = update(masking.table).where(*unchanged).values(masking.masked)
        if "dtmf_digits" not in masking.masked:
            counts[masking.kind] += connection.execute(masked).rowcount
            continue
        # Reports count pressed keys, so their tallies change with a transaction's.
        for row in connection.execute(masked.returning(voice_transaction)):
            counts[masking.kind] += 1
            before = tallies.profile({**row._mapping, **masking.held})
            tallies.note(connection, row.deployment_id, [tallies.change(before, tallies.profile(row._mapping))])
    return counts


async def _find_number(
    run: AuditedRun, store: Store, digits: str, *, is_first_pass: bool, advance: Advance
) -> AsyncIterator[list[_Masking]]:
    """Yield the rows that hold the number, some at a time: first those of transactions, then those of updates."""
    last = ""
    while transactions := await store.read(partial(_read_transactions, last=last)):
        last = transactions[-1].transaction_id
        if is_first_pass:
            ids = [row.transaction_id for row in transactions]
            run.counts.update(kept_ids=sum(privacy.forget_in_text(digits, held) != held for held in ids))
        if maskings := list(filter(None, (_mask_transaction(digits, row) for row in transactions))):
            yield maskings
        advance(len(transactions))
    place = ("", b"")
    while history := await store.read(partial(_read_history, place=place)):
        place = (history[-1].transaction_id, history[-1].digest)
        if maskings := list(filter(None, (_mask_update(digits, row) for row in history))):
            yield maskings
        advance(len(history))


def _mask_transaction(digits: str, row: Any) -> _Masking | None:
    texts = {name: text for name in _TEXT_FIELDS if (text := getattr(row, name)) is not None}
    forgotten = {name: privacy.forget_in_text(digits, text) for name, text in texts.items()}
    masked = {name: text for name, text in forgotten.items() if text != texts[name]}
    if not masked:
        return None
    for name, keys_left in masked.items():
        if PRIVACY[name] is Privacy.KEYS:
            # An asterisk is a key on a phone, so it cannot stand for an erased one.
            masked[name] = "".join(
                left if left == pressed else ERASED_KEY for pressed, left in zip(texts[name], keys_left, strict=True)
            )
    held = {name: texts[name] for name in masked}
    return _Masking(voice_transaction, {"transaction_id": row.transaction_id}, held, masked)


def _mask_update(digits: str, row: Any) -> _Masking | None:
    masked = privacy.forget_in_body(digits, row.body)
    if masked == row.body:
        return None
    key = {"transaction_id": row.transaction_id, "digest": row.digest}
    return _Masking(voice_update, key, {"body": row.body}, {"body": masked})


def _read_transactions(connection: Connection, last: str) -> Sequence[Any]:
    columns = voice_transaction.c
    return connection.execute(
        select(columns.transaction_id, *(columns[name] for name in _TEXT_FIELDS))
        .where(columns.transaction_id > last)
        .order_by(columns.transaction_id)
        .limit(_TRANSACTIONS_AT_ONCE)
    ).all()


def _read_history(connection: Connection, place: tuple[str, bytes]) -> Sequence[Any]:
    columns = voice_update.c
    transaction_id, digest = place
    sent = tuple_(literal(transaction_id, columns.transaction_id.type), literal(digest, columns.digest.type))
    return connection.execute(
        select(columns.transaction_id, columns.digest, columns.body)
        .where(tuple_(columns.transaction_id, columns.digest) > sent)
        .order_by(columns.transaction_id, columns.digest)
        .limit(_BODIES_AT_ONCE)
    ).all()
