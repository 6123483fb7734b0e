"""Recording an update: merge it into its transaction, and return once it is on disk.

Brings committer, store and merge together. `voicetx.api.updates` calls it with a valid update from a caller that is
allowed to send it. Knows no HTTP.
Source: docs/contract.md, section 5.
"""

import asyncio
import time
from asyncio import Future
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import Connection

from voicetx import metrics
from voicetx.contract.merge import apply
from voicetx.contract.refusals import Refusal, Rejected
from voicetx.contract.update import Update
from voicetx.counting import activity
from voicetx.recording.batch import (
    Batch,
    Change,
    Found,
    Received,
    look_up,
    record_changes,
    register_unassigned,
)
from voicetx.recording.group_commit import Closed, CommitTimeout, GroupCommitter, QueueFull
from voicetx.settings import Settings, UnknownTransactions
from voicetx.storage.store import Store, StoreUnavailable, ValueRefused

_RETRY_AFTER_SECONDS = 1
_COMPANY_SECONDS = 0.001  # the shortest time that uvloop can wait

_log = structlog.get_logger(__name__)


class Outcome(Enum):
    """What became of one update of a batch that was committed."""

    RECORDED = "recorded"
    REPEATED = "repeated"
    UNKNOWN = "unknown"


class Committed(NamedTuple):
    """What became of a batch: an outcome for each update, in order, and figures for the metrics."""

    outcomes: Sequence[Outcome]
    stale: Counter[UUID]
    inconsistent: int


_OUTCOMES = {outcome: metrics.UPDATES.labels(outcome.value) for outcome in Outcome}


class Recorder:
    """Records updates in groups: all that wait at one moment share one database transaction.

    Start it on the event loop that it serves, and close it there: closing commits and answers all that was accepted.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        # A single process handles half of its clients while the database commits the other half; with a file's writer
        # it is the same. Several processes take processor time from each other and from the database
        # (docs/decisions/0019-company.md).
        shares_processors = settings.workers > 1 and not store.is_embedded
        self._store = store
        self._registers_unknown = settings.unknown_transactions is UnknownTransactions.REGISTER
        self._committer: GroupCommitter[Received, Outcome] = GroupCommitter(
            self._commit,
            batch_size=settings.commit_batch_size,
            queue_size=settings.commit_queue_size,
            timeout_seconds=settings.commit_timeout_seconds,
            company_seconds=_COMPANY_SECONDS if shares_processors else 0.0,
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

        Raises `Rejected`: 1010 for a transaction id that nobody registered, 500 if the store did not take the update.
        """
        try:
            outcome = await self.submit(update, api_key_id)
        except Exception as error:
            raise self.explain(error) from error
        if outcome is Outcome.UNKNOWN:
            raise Rejected(Refusal.NOT_PROCESSED)
        return outcome

    def submit(self, update: Update, api_key_id: UUID) -> Future[Outcome]:
        """Queue an update to be recorded with others; the future gives its outcome, which may be UNKNOWN.

        Raises, here or from the future, exceptions that `explain` turns into refusals.
        """
        return self._committer.submit(Received(update, api_key_id, time.time_ns() // 1_000_000))

    @staticmethod
    def explain(error: Exception) -> Exception:
        """Return the refusal to answer a failure to record with; an unexpected exception is returned as it is."""
        match error:
            case QueueFull() | Closed() | CommitTimeout() | StoreUnavailable():
                _log.warning("update.not_recorded", reason=type(error).__name__, cause=str(error))
                return Rejected(Refusal.INTERNAL, retry_after_seconds=_RETRY_AFTER_SECONDS)
            case ValueRefused():
                # A retry would not help, so the answer suggests none.
                _log.error("update.refused_by_database", cause=str(error))
                return Rejected(Refusal.INTERNAL)
            case _:
                return error

    async def _commit(self, batch: Sequence[Received]) -> Sequence[Outcome]:
        metrics.WAITING.set(self._committer.waiting)
        metrics.BATCH_UPDATES.observe(len(batch))
        started = time.perf_counter()
        work = partial(commit_batch, batch=Batch(batch), registers_unknown=self._registers_unknown)
        try:
            committed = await self._store.write_in_steps(work)
        except Exception:
            metrics.FAILED_COMMITS.inc()
            raise
        metrics.COMMIT_SECONDS.observe(time.perf_counter() - started)
        # Runs before any caller is answered, but after the next batch is sent: the database need not wait for it.
        asyncio.get_running_loop().call_soon(_count, batch, committed)
        return committed.outcomes


def _count(batch: Sequence[Received], committed: Committed) -> None:
    senders = [received.api_key_id for received in batch]
    for (api_key_id, outcome), times in Counter(zip(senders, committed.outcomes, strict=True)).items():
        _OUTCOMES[outcome].inc(times)
        if outcome is not Outcome.UNKNOWN:  # that is a refusal, and those are counted by code
            activity.count(api_key_id, outcome.value, times)
    if Outcome.REPEATED in committed.outcomes:
        for received, outcome in zip(batch, committed.outcomes, strict=True):
            if outcome is Outcome.REPEATED:
                activity.count_repeat(received.update.transaction_id, received.update.digest)
    for api_key_id, times in committed.stale.items():
        metrics.STALE.inc(times)
        activity.count(api_key_id, "stale", times)
    metrics.INCONSISTENT.inc(committed.inconsistent)


def commit_batch(connection: Connection, batch: Sequence[Received], *, registers_unknown: bool = False) -> Committed:
    """Record a batch, which may be empty.

    It may be run again after a failure: updates that were recorded then count as repeats. Other processes may change
    the same transactions: each is written back only if it is still as it was read; otherwise it is read and merged
    again.
    """
    register_at_ms = max((received.received_at_ms for received in batch), default=0) if registers_unknown else None
    # The same update twice in one batch: the second is a repeat of the first.
    waiting: dict[str, dict[bytes, Received]] = {}
    for received in batch:
        waiting.setdefault(received.update.transaction_id, {}).setdefault(received.update.digest, received)

    unknown: set[str] = set()
    recorded: set[int] = set()
    stale: Counter[UUID] = Counter()
    inconsistent = 0
    while waiting:
        found = _find(connection, waiting, register_at_ms)
        unknown |= waiting.keys() - found.keys()
        changes = _merge(found, waiting)
        written = record_changes(connection, changes.values()) if changes else set()
        for transaction_id in written:
            _, _, transaction, new = changes[transaction_id]
            recorded.update(map(id, new))
            for received in new:
                if received.update.position != transaction.position:
                    stale[received.api_key_id] += 1
            inconsistent += transaction.is_inconsistent
        waiting = {transaction_id: waiting[transaction_id] for transaction_id in changes.keys() - written}
    outcomes = [
        Outcome.UNKNOWN
        if received.update.transaction_id in unknown
        else Outcome.RECORDED
        if id(received) in recorded
        else Outcome.REPEATED
        for received in batch
    ]
    return Committed(outcomes, stale, inconsistent)


def _find(
    connection: Connection, waiting: Mapping[str, Mapping[bytes, Received]], register_at_ms: int | None
) -> dict[str, Found]:
    """Look up the transactions of these updates; given a time, first register those that are not registered."""
    found = look_up(connection, waiting)
    missing = waiting.keys() - found.keys()
    if missing and register_at_ms is not None:
        register_unassigned(connection, missing, register_at_ms)
        found |= look_up(connection, {transaction_id: waiting[transaction_id] for transaction_id in missing})
    return found


def _merge(found: Mapping[str, Found], waiting: Mapping[str, Mapping[bytes, Received]]) -> dict[str, Change]:
    """Return, by transaction id, the changes made by those updates that are not in the history yet."""
    changes: dict[str, Change] = {}
    for transaction_id, (transaction, deployment_id, held) in found.items():
        new = [received for digest, received in waiting[transaction_id].items() if digest not in held]
        if new:
            merged = transaction
            for received in new:
                merged = apply(merged, received.update)
            changes[transaction_id] = Change(transaction, deployment_id, merged, new)
    return changes
