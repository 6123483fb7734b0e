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
from voicetx.store import UNASSIGNED, insert_transactions, match_ids, take_now_ms
from voicetx.tallies import Sent

_TRANSACTION_ID = TypeAdapter(TransactionId)
_FIELD = "transaction-id"
_NO_HEADER = f"The file's first line must be a header that names {_FIELD}."
_MOST_LINES_OF_A_ROW = 100  # each of which may have the row read anew
_LONGEST_ROW = 131_072  # characters, as Python's csv has it for a field


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
    if not is_id(deployment_id):
        raise DeploymentError("A deployment id has 1 to 128 visible ASCII characters.")
    if is_step(deployment_id):
        raise DeploymentError(f"A deployment id is not {deployment_id}: in an address that is a step, and no name.")
    if name is not None and not is_name(name.strip()):
        raise DeploymentError("A deployment's name has 1 to 256 printable characters.")
    if is_there(connection, deployment_id):
        raise DeploymentTaken(f"There is a deployment {deployment_id} already.")
    connection.execute(
        insert(deployment).values(
            deployment_id=deployment_id,
            name=name.strip() if name is not None else deployment_id,
            created_at_ms=time.time_ns() // 1_000_000,
        )
    )


def is_id(text: str) -> bool:
    """Say whether a transaction or a deployment may have this id."""
    try:
        _TRANSACTION_ID.validate_python(text)
    except ValidationError:
        return False
    return True


def is_step(text: str) -> bool:
    """Say whether clients remove this from a path, escaped or not (RFC 3986, 5.2.4), so that nobody can ask for it."""
    return text in {".", ".."}


def is_name(text: str) -> bool:
    """Say whether a deployment may be called so: a terminal that shows it must not be steered by it."""
    return 1 <= len(text) <= 256 and text.isprintable()  # noqa: PLR2004 - the column's length


def find_deployment(connection: Connection, deployment_id: str) -> Deployment:
    """Return a deployment with its counts; raises `DeploymentError` where there is none."""
    for found in list_deployments(connection, deployment_id):
        return found
    raise _refuse(deployment_id)


def require_deployment(connection: Connection, deployment_id: str) -> None:
    """Raise `DeploymentError` where there is no such deployment; asks for none of its counts."""
    if not is_there(connection, deployment_id):
        raise _refuse(deployment_id)


def is_there(connection: Connection, deployment_id: str) -> bool:
    """Say whether there is such a deployment."""
    found = connection.execute(select(deployment.c.deployment_id).where(deployment.c.deployment_id == deployment_id))
    return found.first() is not None


def _refuse(deployment_id: str) -> DeploymentError:
    return DeploymentError(f"There is no deployment {deployment_id}. Make it with: voicetx deployment create")


def list_deployments(connection: Connection, only: str | None = None) -> list[Deployment]:
    """Return the deployments, oldest first, with their counts; or the one that is asked for, if it is there."""
    wanted = select(deployment).order_by(deployment.c.created_at_ms, deployment.c.deployment_id)
    if only is not None:
        wanted = wanted.where(deployment.c.deployment_id == only)
    counts = tallies.read_registered(connection, only)
    return [
        Deployment(row.deployment_id, row.name, row.created_at_ms, *counts.get(row.deployment_id, (0, 0)))
        for row in connection.execute(wanted)
    ]


def register_transactions(connection: Connection, deployment_id: str, ids: Collection[str]) -> set[str]:
    """Register transactions with a deployment and return those that belong to another one, which stay there.

    Those that an update registered by itself (under `unassigned`) are taken over. May be repeated.
    """
    require_deployment(connection, deployment_id)
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
        .values(deployment_id=deployment_id, registered_at_ms=take_now_ms(connection))
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


def guess_format(first_line: str) -> FileFormat:
    """Return which format a file has, by its first line."""
    return FileFormat.NDJSON if first_line.lstrip("\ufeff \t\r\n").startswith("{") else FileFormat.CSV


def read_lines(lines: Iterable[str], file_format: FileFormat) -> Iterator[Line]:
    """Read the transaction ids of a file, line by line; numbers count from 1, a CSV's header among them.

    Raises `DeploymentError` for a CSV whose header does not name `transaction-id`.
    """
    reader = LineReader(file_format)
    for number, text in enumerate(lines, start=1):
        if (line := reader.read(number, text)) is not None:
            yield line
    if (line := reader.end()) is not None:
        yield line


class LineReader:
    """Reads the transaction ids of a file from its lines, as they come in.

    A row of a CSV may go over several lines, in quotes: it is read, and numbered, with the last of them.
    """

    def __init__(self, file_format: FileFormat) -> None:
        self._format = file_format
        self._place: int | None = None  # of the id in a CSV's rows, once its header is read
        self._row: list[str] = []  # lines of a row that has not ended
        self._row_length = 0
        self._number = 0

    def read(self, number: int, text: str) -> Line | None:
        """Return what a line, its end included, comes to; None for one that is blank, or not the end of its row.

        Raises `DeploymentError` for a CSV's header that does not name `transaction-id`.
        """
        self._number = number
        if self._format is FileFormat.NDJSON:
            return _read_json_line(number, text) if text.strip() else None
        self._row.append(text)
        self._row_length += len(text)
        if len(self._row) > 1 and '"' not in text and not self._is_too_long:
            return None  # in quotes, and no end of them
        try:
            row = None if self._is_too_long else next(csv.reader(_offer(self._row), strict=True))
        except _RowGoesOnError:
            return None
        except csv.Error as error:
            return self._refuse(f"not CSV: {error}")
        if row is None:
            return self._refuse("not CSV: a row in quotes does not end")
        self._drop_row()
        return self._read_row(row)

    def end(self) -> Line | None:
        """Return what is wrong with the end of the file; raises as `read` for a file that is empty."""
        if self._row:
            return self._refuse("not CSV: unexpected end of data")
        if self._format is FileFormat.CSV and self._place is None:
            raise DeploymentError(_NO_HEADER)
        return None

    @property
    def _is_too_long(self) -> bool:
        return len(self._row) > _MOST_LINES_OF_A_ROW or self._row_length > _LONGEST_ROW

    def _read_row(self, row: list[str]) -> Line | None:
        if self._place is None:
            header = [name.strip() for name in row]
            if _FIELD not in header:
                raise DeploymentError(_NO_HEADER)
            self._place = header.index(_FIELD)
            return None
        if not row:
            return None
        if self._place >= len(row):
            return Line(self._number, None, f"no {_FIELD}")
        return _judge(self._number, row[self._place])

    def _refuse(self, fault: str) -> Line:
        self._drop_row()
        if self._place is None:
            raise DeploymentError(f"The file's first line is {fault}.")
        return Line(self._number, None, fault)

    def _drop_row(self) -> None:
        self._row.clear()
        self._row_length = 0


class _RowGoesOnError(Exception):
    """A row of a CSV does not end with the lines that are there."""


def _offer(lines: Iterable[str]) -> Iterator[str]:
    yield from lines
    raise _RowGoesOnError


def _read_json_line(number: int, line: str) -> Line:
    try:
        row = from_json(line)
    except ValueError:
        return Line(number, None, "not JSON")
    if not isinstance(row, dict) or not isinstance(row.get(_FIELD), str):
        return Line(number, None, f'not an object with a text "{_FIELD}"')
    return _judge(number, row[_FIELD])


def _judge(number: int, text: str) -> Line:
    transaction_id = text.strip()
    if is_id(transaction_id):
        return Line(number, transaction_id)
    return Line(number, None, f"{_FIELD} must be 1 to 128 visible ASCII characters")
