"""Purge: old transactions are deleted with their history, and deployments that are then empty.

Called by the command line, beside services that write. It walks the transactions by their key, some at a time, and
deletes in small transactions with a pause after each, so that updates get their turn. What is deleted stays deleted
where a run is stopped. Source: docs/decisions/0014-purge-and-erase.md.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, select

from voicetx.access import authenticator
from voicetx.campaigns.audit import Advance, AuditedRun
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.storage.schema import UNASSIGNED, access_token, deployment, voice_transaction, voice_update
from voicetx.storage.statements import match_ids
from voicetx.storage.store import Store, ValueRefused

_TRANSACTIONS_AT_ONCE = 1_000
_UPDATES_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class Purged:
    """What was deleted, or would be."""

    transactions: int = 0
    updates: int = 0
    deployments: int = 0
    access_tokens: int = 0


async def purge_transactions(
    store: Store, before_ms: int, *, deployment_id: str | None = None, is_dry_run: bool = False, advance: Advance
) -> Purged:
    """Delete the transactions whose last update came before an instant, with their history; return what was deleted.

    For a transaction without updates, the time of its registration counts. Without `deployment_id`, empty deployments
    made before that instant are deleted too (except `unassigned`), and access tokens that expired long ago. A
    transaction that is updated meanwhile stays. May be stopped and run again. Raises what `Store` raises.
    """
    subject = {"before_ms": before_ms, "deployment": deployment_id}
    run = await AuditedRun.begin(store, "purge", subject, is_dry_run=is_dry_run)
    populated = await _purge_old_transactions(run, store, before_ms, deployment_id, advance)
    if deployment_id is None:
        await _purge_deployments(run, store, before_ms, populated)
        if is_dry_run:
            run.counts.update(access_tokens=await store.read(_count_tokens))
        else:
            await run.write(_delete_tokens)
    await run.end()
    return Purged(**run.counts)


async def purge_deployment(store: Store, deployment_id: str) -> Purged:
    """Delete a deployment with all its transactions, whatever their age, and their history; return what went.

    A transaction that is updated or registered meanwhile stays, and so does the deployment. May be stopped and run
    again. Raises what `Store` raises.
    """
    before_ms = time.time_ns() // 1_000_000
    run = await AuditedRun.begin(
        store, "purge", {"before_ms": before_ms, "deployment": deployment_id}, is_dry_run=False
    )
    await _purge_old_transactions(run, store, before_ms, deployment_id, lambda _: None)
    with suppress(ValueRefused):  # the foreign key says that it is not empty
        await run.write(partial(_delete_deployment, deployment_id=deployment_id, before_ms=before_ms))
    await run.end()
    return Purged(**run.counts)


def _is_old(before_ms: int) -> ColumnElement[bool]:
    made = select(deployment.c.created_at_ms).where(deployment.c.deployment_id == voice_transaction.c.deployment_id)
    return (
        func.coalesce(voice_transaction.c.updated_at_ms, voice_transaction.c.registered_at_ms, made.scalar_subquery())
        < before_ms
    )


async def _purge_old_transactions(
    run: AuditedRun, store: Store, before_ms: int, deployment_id: str | None, advance: Advance
) -> set[str]:
    """Delete old transactions, of one deployment or of all; return the deployments that have newer ones."""
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
    """Cut rows into batches that have at most `_UPDATES_AT_ONCE` updates, or one row."""
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
    # The age is checked again in the statement that deletes, so a row that was updated since it was read stays. Nobody
    # adds to the history of a row that is deleted or locked, so the second statement deletes all of it.
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
    changes: dict[str, list[str]] = {}
    for row in gone:
        change = tallies.change(tallies.profile(row._mapping), "", removed=history[row.transaction_id])
        changes.setdefault(row.deployment_id, []).append(change)
    for deployment_id, lost in changes.items():
        tallies.note(connection, deployment_id, lost, registered=-len(lost))
    return {"transactions": len(gone), "updates": sum(map(len, history.values()))}


async def _purge_deployments(run: AuditedRun, store: Store, before_ms: int, populated: set[str]) -> None:
    """Delete the old deployments that are empty, or count them in a dry run."""
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
            continue  # the foreign key says that it is not empty, or is being filled at this moment


def _delete_deployment(connection: Connection, deployment_id: str, before_ms: int) -> dict[str, int]:
    # Its age is checked again: another purge may have deleted it, and somebody may have made it anew.
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
