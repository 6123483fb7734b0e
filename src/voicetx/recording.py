"""Recording: an update goes in, and comes out when it is on disk. Committer, store and merge put together.

Called by `voicetx.api.updates` with an update that kept every rule, from a caller that was let in. Knows no HTTP.
Source: docs/contract.md, section 5.
"""

import time
from asyncio import Future
from collections.abc import Mapping, Sequence
from enum import Enum
from uuid import UUID

import structlog
from sqlalchemy import Connection

from voicetx.contract import Update
from voicetx.errors import Refusal, Rejected
from voicetx.group_commit import Closed, CommitTimeout, GroupCommitter, QueueFull
from voicetx.merge import Transaction, apply, fold
from voicetx.settings import Settings, UnknownTransactions
from voicetx.store import (
    Received,
    Store,
    StoreUnavailable,
    ValueRefused,
    insert_history,
    read_history,
    read_transactions,
    register_unassigned,
    write_transactions,
)

_RETRY_AFTER_SECONDS = 1

_log = structlog.get_logger(__name__)


class Outcome(Enum):
    """What became of one update of a batch; committed in each case."""

    RECORDED = "recorded"
    REPEATED = "repeated"
    UNKNOWN = "unknown"


class Recorder:
    """Records updates in groups: everybody who waits shares one database transaction.

    Start it on the event loop that it serves, and close it there: closing commits and answers all that was accepted.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._registers_unknown = settings.unknown_transactions is UnknownTransactions.REGISTER
        self._committer: GroupCommitter[Received, Outcome] = GroupCommitter(
            self._commit,
            batch_size=settings.commit_batch_size,
            queue_size=settings.commit_queue_size,
            timeout_seconds=settings.commit_timeout_seconds,
            whole_batch_errors=(StoreUnavailable,),
        )

    @property
    def is_running(self) -> bool:
        """Say whether updates are being taken and committed."""
        return self._committer.is_running

    def start(self) -> None:
        """Begin to take updates."""
        self._committer.start()

    async def close(self) -> None:
        """Take no more updates; return when all that were accepted are answered."""
        await self._committer.close()

    async def record_update(self, update: Update, api_key_id: UUID) -> Outcome:
        """Record an update; when this returns, it is durably committed, by this call or by an earlier one.

        Raises `Rejected`: 1010 for a transaction id that nobody registered, 500 where the store did not take it.
        """
        try:
            outcome = await self.submit(update, api_key_id)
        except Exception as error:
            raise self.explain(error) from error
        if outcome is Outcome.UNKNOWN:
            raise Rejected(Refusal.NOT_PROCESSED)
        return outcome

    def submit(self, update: Update, api_key_id: UUID) -> Future[Outcome]:
        """Have an update recorded together with others; the future tells its outcome, UNKNOWN included.

        Raises, here or from the future, what `explain` understands.
        """
        return self._committer.submit(Received(update, api_key_id, time.time_ns() // 1_000_000))

    @staticmethod
    def explain(error: Exception) -> Exception:
        """Return the refusal that a failure to record means; what nobody foresaw is returned as it is."""
        match error:
            case QueueFull() | Closed() | CommitTimeout() | StoreUnavailable():
                _log.warning("update.not_recorded", reason=type(error).__name__, cause=str(error))
                return Rejected(Refusal.INTERNAL, retry_after_seconds=_RETRY_AFTER_SECONDS)
            case ValueRefused():
                # A retry would not help, and none is suggested.
                _log.error("update.refused_by_database", cause=str(error))
                return Rejected(Refusal.INTERNAL)
            case _:
                return error

    async def _commit(self, batch: Sequence[Received]) -> list[Outcome]:
        return await self._store.write(
            lambda connection: commit_batch(connection, batch, registers_unknown=self._registers_unknown)
        )


def commit_batch(
    connection: Connection, batch: Sequence[Received], *, registers_unknown: bool = False
) -> list[Outcome]:
    """Record a batch inside the connection's transaction; one outcome for each update, in order.

    May be run again after a rollback. Other processes may be at the same transactions: a row is written back only if
    it still is what was read, and is otherwise read and merged again.
    """
    now_ms = max(received.received_at_ms for received in batch)
    ids = {received.update.transaction_id for received in batch}
    transactions = read_transactions(connection, ids)
    if registers_unknown and len(transactions) < len(ids):
        unregistered = ids - transactions.keys()
        register_unassigned(connection, unregistered, now_ms)
        transactions |= read_transactions(connection, unregistered)

    known = [received for received in batch if received.update.transaction_id in transactions]
    new_keys = insert_history(connection, known) if known else set()
    new: dict[str, list[Update]] = {}
    outcomes: list[Outcome] = []
    unclaimed = set(new_keys)
    for received in batch:
        if received.update.transaction_id not in transactions:
            outcomes.append(Outcome.UNKNOWN)
        elif received.key in unclaimed:
            unclaimed.remove(received.key)  # a twin in the same batch is a repeat of this one
            new.setdefault(received.update.transaction_id, []).append(received.update)
            outcomes.append(Outcome.RECORDED)
        else:
            outcomes.append(Outcome.REPEATED)

    while new:
        merged = _merge(connection, transactions, new)
        written = write_transactions(connection, merged, now_ms)
        new = {transaction_id: updates for transaction_id, updates in new.items() if transaction_id not in written}
        if new:
            transactions = read_transactions(connection, new.keys())
    return outcomes


def _merge(
    connection: Connection, transactions: Mapping[str, Transaction], new: Mapping[str, Sequence[Update]]
) -> dict[str, tuple[int, Transaction]]:
    """Return for each id the count of updates that was seen and the transaction with the new updates in it."""
    merged: dict[str, tuple[int, Transaction]] = {}
    late: set[str] = set()
    for transaction_id, updates in new.items():
        transaction = _apply_all(transactions[transaction_id], updates)
        if transaction is None:
            late.add(transaction_id)
        else:
            merged[transaction_id] = transactions[transaction_id].updates, transaction
    if late:
        for transaction_id, history in read_history(connection, late).items():
            merged[transaction_id] = transactions[transaction_id].updates, fold(transaction_id, history)
    return merged


def _apply_all(transaction: Transaction, updates: Sequence[Update]) -> Transaction | None:
    merged: Transaction | None = transaction
    for update in updates:
        merged = apply(merged, update) if merged is not None else None
    return merged
