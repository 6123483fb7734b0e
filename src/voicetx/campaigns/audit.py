"""Audit records: who purged or erased what, when, and how much of it.

A purge or an erasure is an `AuditedRun`. Its record is written before anything else is, and grows in the same
transactions as the work itself, so it is right also where a run was stopped half way.
Source: docs/decisions/0014-purge-and-erase.md.
"""

import asyncio
import os
import pwd
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import orjson
from sqlalchemy import Connection, insert, select, update

from voicetx.storage.schema import audit_record
from voicetx.storage.statements import look_up_by_key
from voicetx.storage.store import Store

Advance = Callable[[int], None]
"""Called with the number of rows that a run has looked at since it was called last."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One run: what was done, by whom, when, to what, and how much of it.

    `ended_at_ms` is None while the run goes on, and where it was stopped before its end.
    """

    action: str
    operator: str
    subject: dict[str, Any]
    counts: dict[str, int]
    started_at_ms: int
    ended_at_ms: int | None


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


class AuditedRun:
    """One purge or erasure: what it has done so far, and its record. A dry run writes nothing, not even a record."""

    def __init__(self, store: Store, record_id: UUID | None) -> None:
        self.counts: Counter[str] = Counter()
        self.is_dry = record_id is None
        self._store = store
        self._record_id = record_id

    @classmethod
    async def begin(cls, store: Store, action: str, subject: Mapping[str, Any], *, is_dry_run: bool) -> "AuditedRun":
        """Begin a run by writing its record."""
        if is_dry_run:
            return cls(store, None)
        record_id = uuid4()
        values = {
            "audit_record_id": record_id,
            "action": action,
            "operator": _find_operator(),
            "subject": orjson.dumps(subject).decode(),
            "counts": "{}",
            "started_at_ms": time.time_ns() // 1_000_000,
        }
        await store.write(lambda connection: connection.execute(insert(audit_record).values(values)))
        return cls(store, record_id)

    async def write(self, work: Callable[[Connection], Mapping[str, int]]) -> None:
        """Run work that returns counts of what it did, and add these to the record in the same transaction.

        Then sleep for as long as that took, so that updates get their turn.
        """

        def write(connection: Connection) -> Counter[str]:
            look_up_by_key(connection)
            counts = self.counts + Counter(work(connection))
            connection.execute(self._change_record(counts=orjson.dumps(counts).decode()))
            return counts

        started = time.perf_counter()
        self.counts = await self._store.write(write)
        await asyncio.sleep(time.perf_counter() - started)

    async def end(self) -> None:
        """Note in the record that the run came to its end."""
        if not self.is_dry:
            ended = self._change_record(
                counts=orjson.dumps(self.counts).decode(), ended_at_ms=time.time_ns() // 1_000_000
            )
            await self._store.write(lambda connection: connection.execute(ended))

    def _change_record(self, **values: Any) -> Any:
        return update(audit_record).where(audit_record.c.audit_record_id == self._record_id).values(values)


def _find_operator() -> str:
    """Return the name of the user who runs the command, or the number where there is no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
