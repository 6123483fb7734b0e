"""Deployments: how the platform registers the transactions of a campaign run before its dialer rings anybody.

Called by the command line and over HTTP. Transactions go in set by set, not row by row, so that a campaign of hundreds
of thousands loads in seconds. Source: docs/contract.md, section 5.
"""

import codecs
import csv
import re
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from sqlalchemy import Connection, insert, select, update

from voicetx.contract.update import TransactionId
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.storage.schema import deployment, voice_transaction, voice_update
from voicetx.storage.store import UNASSIGNED, insert_transactions, match_ids, take_now_ms

_TRANSACTION_ID = TypeAdapter(TransactionId)
_FIELD = "transaction-id"
_NO_HEADER = (
    f"The file's first line must be a header that names {_FIELD}, with commas, semicolons or tabs between names."
)
_DELIMITERS: tuple[str, ...] = (",", ";", "\t")
_SAYS_DELIMITER = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)
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


def guess_encoding(start: bytes) -> str:
    """Return how a file's text is encoded, by its first two bytes: UTF-16 where its mark says so, else UTF-8."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_lines(lines: Iterable[str], file_format: FileFormat) -> Iterator[Line]:
    """Read the transaction ids of a file, line by line; numbers count from 1, a CSV's header among them.

    Raises `DeploymentError` for a CSV whose header does not name `transaction-id`.
    """
    reader = LineReader(file_format)
    for number, text in enumerate(lines, start=1):
        yield from reader.read(number, text)
    yield from reader.end()


class _Text(NamedTuple):
    """A line; counted once, for it may be read again a hundred times."""

    number: int
    text: str
    quotes: int


class LineReader:
    """Reads the transaction ids of a file from its lines, as they come in.

    A row of a CSV may go over several lines, in quotes: it is read, and numbered, with the last of them. Quotes that do
    not end as they should, or that make an id of several lines, cost the line on which they begin, and the lines after
    it are read each for itself. Between cells stands a comma, a semicolon or a tab, whichever makes the header name
    `transaction-id`, or what a first line such as `sep=;` says, as Excel has it.
    """

    def __init__(self, file_format: FileFormat) -> None:
        self._format = file_format
        self._delimiters = _DELIMITERS
        self._place: int | None = None  # of the id in a CSV's rows, once its header is read
        self._row: list[_Text] = []  # lines of a row that has not ended
        self._row_length = 0

    def read(self, number: int, text: str) -> list[Line]:
        """Return what a line, its end included, comes to; nothing for one that is blank, or not the end of its row.

        Raises `DeploymentError` for a CSV's header that does not name `transaction-id`.
        """
        if self._format is FileFormat.NDJSON:
            return [_read_json_line(number, text)] if text.strip() else []
        return self._read_texts([_Text(number, text, text.count('"'))])

    def end(self) -> list[Line]:
        """Return what the end of the file comes to; raises as `read`, and for a file that is empty."""
        found: list[Line] = []
        while self._row:
            line, again = self._end_row()
            found += [] if line is None else [line]
            found += self._read_texts(again)
        if self._format is FileFormat.CSV and self._place is None:
            raise DeploymentError(_NO_HEADER)
        return found

    def _read_texts(self, texts: Iterable[_Text]) -> list[Line]:
        found: list[Line] = []
        waiting = deque(texts)
        while waiting:
            text = waiting.popleft()
            self._row.append(text)
            self._row_length += len(text.text)
            is_too_long = len(self._row) > _MOST_LINES_OF_A_ROW or self._row_length > _LONGEST_ROW
            # Within quotes, an even number of them more leads nowhere else.
            if len(self._row) > 1 and text.quotes % 2 == 0 and not is_too_long:
                continue
            with suppress(_RowGoesOnError):
                is_given_up = is_too_long and len(self._row) > 1
                line, again = self._refuse_quotes() if is_given_up else self._end_row(may_go_on=not is_too_long)
                found += [] if line is None else [line]
                waiting.extendleft(reversed(again))
        return found

    def _end_row(self, *, may_go_on: bool = False) -> tuple[Line | None, list[_Text]]:
        """Return what the lines of a row come to, and those of them that are to be read again.

        Raises `_RowGoesOnError` where it may go on, and more lines may end it.
        """
        texts = [text.text for text in self._row]
        if self._place is None and (said := _SAYS_DELIMITER.fullmatch(texts[0])) is not None:
            self._delimiters = (said[1],)
            return None, self._drop_row(1)
        goes_on = False
        fault = ""
        for delimiter in self._delimiters:
            reader = csv.reader(_offer(texts), delimiter=delimiter, strict=True)
            try:
                cells = next(reader)
            except _RowGoesOnError:
                goes_on = True
            except csv.Error as error:
                fault = fault or f"not CSV: {error}"
            else:
                if self._place is not None and cells:
                    return self._read_row(cells, reader.line_num)
                if not cells or self._read_header(cells, delimiter):
                    return None, self._drop_row(reader.line_num)
        if goes_on and may_go_on:
            raise _RowGoesOnError
        if self._place is None:
            raise DeploymentError(f"The file's first line is {fault}." if fault else _NO_HEADER)
        return self._refuse_quotes() if goes_on or len(texts) > 1 else self._refuse(fault)

    def _read_header(self, cells: Sequence[str], delimiter: str) -> bool:
        names = [name.strip() for name in cells]
        if _FIELD not in names:
            return False
        self._place, self._delimiters = names.index(_FIELD), (delimiter,)
        return True

    def _read_row(self, cells: Sequence[str], lines: int) -> tuple[Line | None, list[_Text]]:
        place = self._place or 0
        number = self._row[lines - 1].number
        if place < len(cells) and "\n" in cells[place].strip():
            return self._refuse_quotes()
        again = self._drop_row(lines)
        return (_judge(number, cells[place]) if place < len(cells) else Line(number, None, f"no {_FIELD}")), again

    def _refuse_quotes(self) -> tuple[Line, list[_Text]]:
        return self._refuse("not CSV: a quote on this line is not closed")

    def _refuse(self, fault: str) -> tuple[Line, list[_Text]]:
        if self._place is None:
            raise DeploymentError(f"The file's first line is {fault}.")
        number = self._row[0].number
        return Line(number, None, fault), self._drop_row(1)

    def _drop_row(self, lines: int) -> list[_Text]:
        """Forget the row, which was read from so many lines; return the lines after these."""
        rest = self._row[lines:]
        self._row, self._row_length = [], 0
        return rest


class _RowGoesOnError(Exception):
    """A row of a CSV does not end with the lines that are there."""


def _offer(lines: Iterable[str]) -> Iterator[str]:
    yield from lines
    raise _RowGoesOnError


class Loading:
    """Counts what becomes of a file's lines, which are registered some at a time.

    Of the lines that are read each comes to one of three: it is the first to name a transaction that is registered with
    the deployment then (`loaded`), it names that once more (`repeated`), or it is at fault (`faulty`).
    """

    def __init__(self) -> None:
        self.loaded = 0
        self.repeated = 0
        self.faulty = 0
        self._known: set[str] = set()
        self._places: dict[str, list[int]] = {}
        self._bad: list[Line] = []
        self._pending = 0

    @property
    def pending(self) -> int:
        """How many lines have come to nothing yet."""
        return self._pending

    @property
    def ids(self) -> list[str]:
        """The ids that are to be registered now."""
        return list(self._places)

    def add(self, lines: Iterable[Line]) -> None:
        """Take lines."""
        for line in lines:
            self._pending += 1
            if line.transaction_id is None:
                self._bad.append(line)
            elif line.transaction_id in self._known:
                self.repeated += 1
            else:
                self._places.setdefault(line.transaction_id, []).append(line.number)

    def settle(self, elsewhere: Collection[str]) -> list[Line]:
        """Note that the ids are registered, but for those of other deployments; return the lines at fault, in order."""
        bad = self._bad
        for transaction_id, (first, *others) in self._places.items():
            if transaction_id in elsewhere:
                bad += [Line(number, transaction_id, "belongs to another deployment") for number in (first, *others)]
            else:
                self.loaded += 1
                self.repeated += len(others)
                self._known.add(transaction_id)
        self.faulty += len(bad)
        self._places, self._bad, self._pending = {}, [], 0
        return sorted(bad, key=lambda line: line.number)


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
