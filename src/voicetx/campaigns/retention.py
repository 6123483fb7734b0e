"""What is not kept: old transactions are deleted, a person's number is masked, and each leaves a record of it.

Called by the command line, beside services that write. Both walk the tables by their keys, a window at a time, and
write in small transactions with pauses between them, so that updates get their turn. What is done stays done, and the
record grows with it: it is right also where a run was stopped. Source: docs/decisions/0014-purge-and-erase.md.
"""

import asyncio
import os
import pwd
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import orjson
from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)

from voicetx.access import authenticator
from voicetx.contract import privacy
from voicetx.contract.update import PRIVACY, Privacy
from voicetx.counting import tallies
from voicetx.counting.tallies import ERASED_KEY, Sent
from voicetx.storage.schema import FIELD_NAMES, access_token, audit_record, deployment, voice_transaction, voice_update
from voicetx.storage.store import UNASSIGNED, Store, ValueRefused, match_ids

Advance = Callable[[int], None]
"""Called with the number of rows that were looked at since it was called last."""

_TRANSACTIONS_AT_ONCE = 1_000
_UPDATES_AT_ONCE = 5_000
_BODIES_AT_ONCE = 500
_MOST_PASSES = 10
_TEXTS = tuple(name for name in FIELD_NAMES if PRIVACY[name] is not Privacy.NOTHING)
"""The fields that may hold a number."""


class StillReported(Exception):  # noqa: N818 - a state of the world, named as one
    """The number came back as often as it was masked: somebody goes on reporting it."""


@dataclass(frozen=True, slots=True)
class Purged:
    """What was deleted, or would be."""

    transactions: int = 0
    updates: int = 0
    deployments: int = 0
    access_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Erased:
    """In how many transactions and updates a number was masked, or would be, and how often all were looked through.

    `kept_ids` counts the transaction ids that hold the number: an id is never changed.
    """

    transactions: int = 0
    updates: int = 0
    passes: int = 0
    kept_ids: int = 0


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """What was done, by whom, when, to what and how much of it; `ended_at_ms` is None where it was stopped."""

    action: str
    operator: str
    subject: dict[str, Any]
    counts: dict[str, int]
    started_at_ms: int
    ended_at_ms: int | None


async def purge(
    store: Store, before_ms: int, *, deployment_id: str | None = None, is_dry_run: bool = False, advance: Advance
) -> Purged:
    """Delete the transactions whose last update came before an instant, with their history; return what went.

    Those that were never reported go by when they were registered. Without `deployment_id` deployments that were
    made before the instant and are empty go as well, but for `unassigned`, and access tokens that expired long ago. A
    transaction that is updated meanwhile stays. May be stopped and run again. Raises as `Store` does.
    """
    subject = {"before_ms": before_ms, "deployment": deployment_id}
    run = await _Run.begin(store, "purge", subject, is_dry_run=is_dry_run)
    populated = await _purge_transactions(run, store, before_ms, deployment_id, advance)
    if deployment_id is None:
        await _purge_deployments(run, store, before_ms, populated)
        if is_dry_run:
            run.counts.update(access_tokens=await store.read(_count_tokens))
        else:
            await run.write(_delete_tokens)
    await run.end()
    return Purged(**run.counts)


async def remove(store: Store, deployment_id: str) -> Purged:
    """Delete a deployment with all its transactions, whatever their age, and their history; return what went.

    A transaction that is updated or registered meanwhile stays, and the deployment with it. May be stopped and run
    again. Raises as `Store` does.
    """
    before_ms = _now_ms()
    run = await _Run.begin(store, "purge", {"before_ms": before_ms, "deployment": deployment_id}, is_dry_run=False)
    await _purge_transactions(run, store, before_ms, deployment_id, lambda _: None)
    with suppress(ValueRefused):  # by the foreign key: it is not empty
        await run.write(partial(_delete_deployment, deployment_id=deployment_id, before_ms=before_ms))
    await run.end()
    return Purged(**run.counts)


async def erase(
    store: Store, digits: str, *, settle_seconds: float, is_dry_run: bool = False, advance: Advance
) -> Erased:
    """Mask a number, given by its digits, in every transaction and update; return how many held it.

    A process that had read a transaction before may write the number back. So all is looked through again until nothing
    is found, `settle_seconds` after the last change: as long as such a process may take. May be stopped and run again.
    Raises `StillReported` where that has no end, and as `Store` does.
    """
    run = await _Run.begin(store, "erase", {"number_digest": privacy.digest_number(digits)}, is_dry_run=is_dry_run)
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
        if not store.is_embedded:  # a database file has one writer, which reads and writes without anybody between
            await asyncio.sleep(settle_seconds)
    raise StillReported


def list_audit_records(connection: Connection) -> list[AuditRecord]:
    """Return every record, oldest first."""
    rows = connection.execute(
        select(audit_record).order_by(audit_record.c.started_at_ms, audit_record.c.audit_record_id)
    )
    return [
        AuditRecord(
            row.action,
            row.operator,
            orjson.loads(row.subject),
            orjson.loads(row.counts),
            row.started_at_ms,
            row.ended_at_ms,
        )
        for row in rows
    ]


class _Run:
    """One run of a command: what it did so far, and the record of it. A dry run has no record and writes nothing."""

    def __init__(self, store: Store, record_id: UUID | None) -> None:
        self.counts: Counter[str] = Counter()
        self.is_dry = record_id is None
        self._store = store
        self._record_id = record_id

    @classmethod
    async def begin(cls, store: Store, action: str, subject: Mapping[str, Any], *, is_dry_run: bool) -> "_Run":
        """Begin a run, with its record before anything else."""
        if is_dry_run:
            return cls(store, None)
        record_id = uuid4()
        values = {
            "audit_record_id": record_id,
            "action": action,
            "operator": _find_operator(),
            "subject": orjson.dumps(subject).decode(),
            "counts": "{}",
            "started_at_ms": _now_ms(),
        }
        await store.write(lambda connection: connection.execute(insert(audit_record).values(values)))
        return cls(store, record_id)

    async def write(self, work: Callable[[Connection], Mapping[str, int]]) -> None:
        """Run work that returns what it did, in a transaction with the record; then leave others as long a time."""

        def write(connection: Connection) -> Counter[str]:
            if connection.dialect.name == "postgresql":
                # Rows are found by key whatever the statistics say; a plan for a small table reads a big one whole.
                connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            counts = self.counts + Counter(work(connection))
            connection.execute(self._change_record(counts=orjson.dumps(counts).decode()))
            return counts

        started = time.perf_counter()
        self.counts = await self._store.write(write)
        await asyncio.sleep(time.perf_counter() - started)

    async def end(self) -> None:
        """Note that nothing was left to do."""
        if not self.is_dry:
            ended = self._change_record(counts=orjson.dumps(self.counts).decode(), ended_at_ms=_now_ms())
            await self._store.write(lambda connection: connection.execute(ended))

    def _change_record(self, **values: Any) -> Any:
        return update(audit_record).where(audit_record.c.audit_record_id == self._record_id).values(values)


def _find_operator() -> str:
    """Return the user that the command runs as: by name, or by number where it has none, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_old(before_ms: int) -> ColumnElement[bool]:
    made = select(deployment.c.created_at_ms).where(deployment.c.deployment_id == voice_transaction.c.deployment_id)
    return (
        func.coalesce(voice_transaction.c.updated_at_ms, voice_transaction.c.registered_at_ms, made.scalar_subquery())
        < before_ms
    )


async def _purge_transactions(
    run: _Run, store: Store, before_ms: int, deployment_id: str | None, advance: Advance
) -> set[str]:
    """Delete old transactions, of one deployment or of all; return the deployments that hold others."""
    populated: set[str] = set()
    find = partial(_find_transactions, deployment_id=deployment_id, before_ms=before_ms)
    last = ""
    while window := await store.read(partial(find, last=last)):
        last = window[-1].transaction_id
        populated.update(row.deployment_id for row in window if not row.is_old)
        for batch in _cut(row for row in window if row.is_old):
            if run.is_dry:
                run.counts.update(transactions=len(batch), updates=sum(row.updates for row in batch))
            else:
                ids = [row.transaction_id for row in batch]
                await run.write(partial(_delete_transactions, ids=ids, before_ms=before_ms))
        advance(len(window))
    return populated


def _find_transactions(connection: Connection, deployment_id: str | None, before_ms: int, last: str) -> Sequence[Any]:
    columns = voice_transaction.c
    found = (
        select(columns.transaction_id, columns.deployment_id, columns.updates, _is_old(before_ms).label("is_old"))
        .where(columns.transaction_id > last)
        .order_by(columns.transaction_id)
        .limit(_TRANSACTIONS_AT_ONCE)
    )
    if deployment_id is not None:
        found = found.where(columns.deployment_id == deployment_id)
    return connection.execute(found).all()


def _cut(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut rows into batches by the length of their histories."""
    batch: list[Any] = []
    updates = 0
    for row in rows:
        if batch and updates + row.updates > _UPDATES_AT_ONCE:
            yield batch
            batch, updates = [], 0
        batch.append(row)
        updates += row.updates
    if batch:
        yield batch


def _delete_transactions(connection: Connection, ids: Sequence[str], before_ms: int) -> dict[str, int]:
    # The statement itself judges each row again, as it is now: one that was updated since it was read stays. Nobody
    # adds to the history of a row that is gone or locked, so what is there of it afterwards is all.
    matches, values = match_ids(connection, ids)
    statement = delete(voice_transaction).where(matches, _is_old(before_ms))
    gone = connection.execute(statement.returning(voice_transaction), values).all()
    columns = voice_update.c
    history: dict[str, list[Sent]] = {row.transaction_id: [] for row in gone}
    deleted = delete(voice_update).where(columns.transaction_id.in_(history))
    for transaction_id, api_key_id, received_at_ms in connection.execute(
        deleted.returning(columns.transaction_id, columns.api_key_id, columns.received_at_ms)
    ):
        history[transaction_id].append(Sent(api_key_id, received_at_ms))
    lines: dict[str, list[str]] = {}
    for row in gone:
        line = tallies.change(tallies.profile(row._mapping), "", removed=history[row.transaction_id])
        lines.setdefault(row.deployment_id, []).append(line)
    for deployment_id, lost in lines.items():
        tallies.note(connection, deployment_id, lost, registered=-len(lost))
    return {"transactions": len(gone), "updates": sum(map(len, history.values()))}


async def _purge_deployments(run: _Run, store: Store, before_ms: int, populated: set[str]) -> None:
    """Delete the old deployments that are empty; in a dry run count those that would be."""
    old = select(deployment.c.deployment_id).where(
        deployment.c.created_at_ms < before_ms, deployment.c.deployment_id != UNASSIGNED
    )
    for deployment_id in await store.read(lambda connection: connection.execute(old).scalars().all()):
        if deployment_id in populated:
            continue
        if run.is_dry:
            run.counts.update(deployments=1)
            continue
        try:
            await run.write(partial(_delete_deployment, deployment_id=deployment_id, before_ms=before_ms))
        except ValueRefused:
            continue  # by the foreign key: it is not empty, or is being filled at this moment


def _delete_deployment(connection: Connection, deployment_id: str, before_ms: int) -> dict[str, int]:
    # Judged again: another purge may have deleted it, and somebody made one of that name anew.
    is_old = deployment.c.created_at_ms < before_ms
    deleted = connection.execute(delete(deployment).where(deployment.c.deployment_id == deployment_id, is_old))
    if deleted.rowcount:
        tallies.forget(connection, deployment_id)
    return {"deployments": deleted.rowcount}


def _count_tokens(connection: Connection) -> int:
    counted = select(func.count()).select_from(access_token).where(authenticator.match_expired_tokens())
    return connection.execute(counted).scalar_one()


def _delete_tokens(connection: Connection) -> dict[str, int]:
    return {
        "access_tokens": connection.execute(delete(access_token).where(authenticator.match_expired_tokens())).rowcount
    }


class _Masking(NamedTuple):
    """A row that holds the number: its table, its key, and the columns to mask, as they are and as they should be."""

    table: Table
    key: Mapping[str, Any]
    held: Mapping[str, str]
    masked: Mapping[str, str]

    @property
    def kind(self) -> str:
        """What is counted by it."""
        return "transactions" if self.table is voice_transaction else "updates"


def _mask(connection: Connection, maskings: Sequence[_Masking]) -> Counter[str]:
    """Mask rows, each unless somebody has changed it since it was read: the next pass sees it again."""
    counts: Counter[str] = Counter()
    for masking in maskings:
        columns = masking.table.c
        unchanged = [columns[name] == value for name, value in {**masking.key, **masking.held}.items()]
        masked = update(masking.table).where(*unchanged).values(masking.masked)
        if "dtmf_digits" not in masking.masked:
            counts[masking.kind] += connection.execute(masked).rowcount
            continue
        # Reports count the keys that a transaction shows.
        for row in connection.execute(masked.returning(voice_transaction)):
            counts[masking.kind] += 1
            before = tallies.profile({**row._mapping, **masking.held})
            tallies.note(connection, row.deployment_id, [tallies.change(before, tallies.profile(row._mapping))])
    return counts


async def _find_number(
    run: _Run, store: Store, digits: str, *, is_first_pass: bool, advance: Advance
) -> AsyncIterator[list[_Masking]]:
    """Yield the rows that hold the number, window by window: of the transactions, and then of their history."""
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
    texts = {name: text for name in _TEXTS if (text := getattr(row, name)) is not None}
    forgotten = {name: privacy.forget_in_text(digits, text) for name, text in texts.items()}
    masked = {name: text for name, text in forgotten.items() if text != texts[name]}
    if not masked:
        return None
    for name, keys_left in masked.items():
        if PRIVACY[name] is Privacy.KEYS:
            # An asterisk is a key, and nobody pressed these.
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
        select(columns.transaction_id, *(columns[name] for name in _TEXTS))
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
