"""Deployments: how the platform registers the transactions of a campaign run before its dialer rings anybody.

Called by the command line and over HTTP. Transactions go in set by set, not row by row, so that a campaign of hundreds
of thousands loads in seconds. Source: docs/contract.md, section 5.
"""

import csv
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from sqlalchemy import Connection, insert, select, update

from voicetx import tallies
from voicetx.contract import TransactionId
from voicetx.schema import deployment, voice_transaction, voice_update
from voicetx.store import UNASSIGNED, insert_transactions, match_ids
from voicetx.tallies import Sent

_TRANSACTION_ID = TypeAdapter(TransactionId)
_FIELD = "transaction-id"


class DeploymentError(Exception):
    """What was asked of a deployment cannot be done; the text is a sentence for the person who asked."""


class DeploymentTaken(DeploymentError):  # noqa: N818 - what is the matter with the id
    """There is a deployment of that id already."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A campaign run: how many transactions it has, and of how many something was reported."""

    deployment_id: str
    name: str
    created_at_ms: int
    transactions: int
    reported: int


class FileFormat(StrEnum):
    """How a file names transaction ids."""

    CSV = "csv"
    NDJSON = "ndjson"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file: the transaction id on it, or what is wrong with it."""

    number: int
    transaction_id: str | None
    fault: str | None = None


def create_deployment(connection: Connection, deployment_id: str, name: str | None) -> None:
    """Make a deployment; raises `DeploymentError` for an id that is none, `DeploymentTaken` for one that is taken."""
    if not _is_id(deployment_id):
        raise DeploymentError("A deployment id has 1 to 128 visible ASCII characters.")
    if name is not None and not is_name(name.strip()):
        raise DeploymentError("A deployment's name has 1 to 256 printable characters.")
    if _exists(connection, deployment_id):
        raise DeploymentTaken(f"There is a deployment {deployment_id} already.")
    connection.execute(
        insert(deployment).values(
            deployment_id=deployment_id,
            name=name.strip() if name is not None else deployment_id,
            created_at_ms=time.time_ns() // 1_000_000,
        )
    )


def is_name(text: str) -> bool:
    """Say whether a deployment may be called so: a terminal that shows it must not be steered by it."""
    return 1 <= len(text) <= 256 and text.isprintable()  # noqa: PLR2004 - the column's length


def find_deployment(connection: Connection, deployment_id: str) -> Deployment:
    """Return a deployment with its counts; raises `DeploymentError` where there is none."""
    for found in list_deployments(connection, deployment_id):
        return found
    raise DeploymentError(f"There is no deployment {deployment_id}. Make it with: voicetx deployment create")


def list_deployments(connection: Connection, only: str | None = None) -> list[Deployment]:
    """Return the deployments, oldest first, with their counts; or the one that is asked for, if it is there."""
    wanted = select(deployment).order_by(deployment.c.created_at_ms, deployment.c.deployment_id)
    if only is None:
        counts = tallies.read_registered(connection)
    else:
        wanted = wanted.where(deployment.c.deployment_id == only)
        counts = {only: tallies.read_totals(connection, only)}
    return [
        Deployment(row.deployment_id, row.name, row.created_at_ms, *counts.get(row.deployment_id, (0, 0)))
        for row in connection.execute(wanted)
    ]


def register_transactions(connection: Connection, deployment_id: str, ids: Collection[str]) -> set[str]:
    """Register transactions with a deployment and return those that belong to another one, which stay there.

    Those that an update registered by itself (under `unassigned`) are taken over. May be repeated.
    """
    if not _exists(connection, deployment_id):
        raise DeploymentError(f"There is no deployment {deployment_id}. Make it with: voicetx deployment create")
    insert_transactions(connection, deployment_id, ids, time.time_ns() // 1_000_000)
    matches, values = match_ids(connection, ids)
    elsewhere = select(voice_transaction.c.transaction_id, voice_transaction.c.deployment_id).where(
        matches, voice_transaction.c.deployment_id != deployment_id
    )
    others = {row.transaction_id: row.deployment_id for row in connection.execute(elsewhere, values)}
    unassigned = {transaction_id for transaction_id, owner in others.items() if owner == UNASSIGNED}
    if unassigned and deployment_id != UNASSIGNED:
        _take_over(connection, deployment_id, unassigned)
    return others.keys() - unassigned


def _take_over(connection: Connection, deployment_id: str, ids: Collection[str]) -> None:
    """Give a deployment transactions that belong to nobody, and what they are to the reports."""
    matches, values = match_ids(connection, ids)
    taken = connection.execute(
        update(voice_transaction)
        .where(matches, voice_transaction.c.deployment_id == UNASSIGNED)
        .values(deployment_id=deployment_id)
        .returning(voice_transaction),
        values,
    ).all()
    # The rows are ours now: nobody adds to their history before this is committed.
    history: dict[str, list[Sent]] = {row.transaction_id: [] for row in taken}
    columns = voice_update.c
    sent = select(columns.transaction_id, columns.api_key_id, columns.received_at_ms).where(
        columns.transaction_id.in_(history)
    )
    for transaction_id, api_key_id, received_at_ms in connection.execute(sent):
        history[transaction_id].append(Sent(api_key_id, received_at_ms))
    profiles = {row.transaction_id: tallies.profile(row._mapping) for row in taken}
    lost = [tallies.change(profiles[name], "", removed=updates) for name, updates in history.items()]
    gained = [tallies.change("", profiles[name], added=updates) for name, updates in history.items()]
    tallies.note(connection, UNASSIGNED, lost, registered=-len(taken))
    tallies.note(connection, deployment_id, gained, registered=len(taken))


def mint_transactions(connection: Connection, deployment_id: str, count: int) -> list[str]:
    """Register `count` transactions with new ids and return the ids."""
    ids = [str(uuid4()) for _ in range(count)]
    register_transactions(connection, deployment_id, ids)
    return ids


def read_lines(lines: Iterable[str], file_format: FileFormat) -> Iterator[Line]:
    """Read the transaction ids of a file, line by line; numbers count from 1, a CSV's header among them.

    Raises `DeploymentError` for a CSV whose header does not name `transaction-id`.
    """
    if file_format is FileFormat.CSV:
        yield from _read_csv(lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _read_json_line(number, line)


def _read_json_line(number: int, line: str) -> Line:
    try:
        row = from_json(line)
    except ValueError:
        return Line(number, None, "not JSON")
    if not isinstance(row, dict) or not isinstance(row.get(_FIELD), str):
        return Line(number, None, f'not an object with a text "{_FIELD}"')
    return _judge(number, row[_FIELD])


def _read_csv(lines: Iterable[str]) -> Iterator[Line]:
    rows = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if _FIELD not in header:
            raise DeploymentError(f"The file's first line must be a header that names {_FIELD}.")
        place = header.index(_FIELD)
    except csv.Error as error:
        raise DeploymentError(f"The file's first line is not CSV: {error}.") from error
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Line(rows.line_num, None, f"not CSV: {error}")
            continue
        if row is None:
            return
        if row:
            fault = None if place < len(row) else f"no {_FIELD}"
            yield _judge(rows.line_num, row[place]) if fault is None else Line(rows.line_num, None, fault)


def _judge(number: int, text: str) -> Line:
    transaction_id = text.strip()
    if _is_id(transaction_id):
        return Line(number, transaction_id)
    return Line(number, None, f"{_FIELD} must be 1 to 128 visible ASCII characters")


def _is_id(text: str) -> bool:
    try:
        _TRANSACTION_ID.validate_python(text)
    except ValidationError:
        return False
    return True


def _exists(connection: Connection, deployment_id: str) -> bool:
    found = connection.execute(select(deployment.c.deployment_id).where(deployment.c.deployment_id == deployment_id))
    return found.first() is not None
