"""Files of transaction ids: CSV, as Excel and databases write it, and NDJSON, read line by line.

A file may hold hundreds of thousands of lines, so it is read as it comes in. A line that is wrong is named with its
number, and the others are read all the same. Source: docs/contract.md, section 5.
"""

import codecs
import csv
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pydantic_core import from_json

from voicetx.campaigns.deployments import DeploymentError
from voicetx.contract.ids import ID_RULE, is_id

_FIELD = "transaction-id"
_NO_HEADER = f"must have a first line, the header that names {_FIELD}, with commas, semicolons or tabs between names"
_DELIMITERS: tuple[str, ...] = (",", ";", "\t")
_SAYS_DELIMITER = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)
_MOST_LINES_OF_A_ROW = 100  # for each of which the row may be parsed once more
_LONGEST_ROW = 131_072  # characters, as Python's csv has it for a field


_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"


class IdFileError(DeploymentError):
    """A file of ids cannot be read at all, for a `reason` that can follow the words "the file"."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The file {reason}.")
        self.reason = reason


class FileFormat(StrEnum):
    """The format of a file of transaction ids."""

    CSV = "csv"
    NDJSON = "ndjson"


@dataclass(frozen=True, slots=True)
class IdLine:
    """A line of a file of ids: the transaction id on it, or what is wrong with it."""

    number: int
    transaction_id: str | None
    fault: str | None = None


def guess_format(first_line: str) -> FileFormat:
    """Return which format a file has, by its first line."""
    return FileFormat.NDJSON if first_line.lstrip("\ufeff \t\r\n").startswith("{") else FileFormat.CSV


def guess_encoding(start: bytes) -> str:
    """Return how a file's text is encoded, by its first four bytes: UTF-16 where its mark says so, else UTF-8.

    Raises `IdFileError` for what is neither: UTF-16 without a mark, UTF-32, gzip and ZIP.
    """
    if start.startswith(_GZIP):
        raise IdFileError("is compressed with gzip; unpack it first")
    if start.startswith(_ZIP):
        raise IdFileError("is a ZIP archive, as Excel's .xlsx files are; save it as CSV")
    if start.startswith(_UTF_32) or start[:4].count(0) == 3:  # noqa: PLR2004 - of the four bytes of an ASCII character
        raise IdFileError("is UTF-32; save it as UTF-8")
    if start.startswith(_UTF_16):
        return "utf-16"
    if b"\0" in start[:4]:
        raise IdFileError("is UTF-16 without a byte order mark; save it as UTF-8")
    return "utf-8-sig"


def read_lines(lines: Iterable[str], file_format: FileFormat) -> Iterator[IdLine]:
    """Read the transaction ids of a file, line by line; numbers count from 1, a CSV's header among them.

    Raises `IdFileError` for a CSV that is empty or whose header does not name `transaction-id`.
    """
    reader = IdFileReader(file_format)
    for number, text in enumerate(lines, start=1):
        yield from reader.read(number, text)
    yield from reader.end()


class _RawLine(NamedTuple):
    """A line as it stands in the file; its quotes are counted once, since it may be read a hundred times."""

    number: int
    text: str
    quotes: int


class IdFileReader:
    """Reads the transaction ids of a file from its lines, as they come in.

    A row of a CSV may go over several lines, in quotes; it has the number of the last of them. Where a quote is not
    closed, an id would go over several lines, or a line within the quotes could be a row with another id, only the line
    with the opening quote is refused, and reading goes on with the next line. Cells are separated by a comma, a
    semicolon or a tab, whichever makes the header name `transaction-id`, or by what a first line such as `sep=;` says,
    which Excel writes.
    """

    def __init__(self, file_format: FileFormat) -> None:
        self._format = file_format
        self._delimiters = _DELIMITERS
        self._place: int | None = None  # of the id in a CSV's rows, once its header is read
        self._widths: set[int] = set()  # how many cells the header and the rows with an id have
        self._row: list[_RawLine] = []  # lines of a row that has not ended
        self._row_length = 0
        self._has_text = False

    def read(self, number: int, text: str) -> list[IdLine]:
        """Return what was read with a line, its line break included: nothing where it is blank, or its row goes on.

        Raises `IdFileError` for a CSV's header that does not name `transaction-id`.
        """
        if self._format is FileFormat.NDJSON:
            return [_read_json_line(number, text)] if text.strip() else []
        self._has_text = self._has_text or not text.isspace()
        return self._read_texts([_RawLine(number, text, text.count('"'))])

    def end(self) -> list[IdLine]:
        """Return what was left to read at the end of the file; raises as `read`, and for an empty file."""
        found: list[IdLine] = []
        while self._row:
            line, again = self._end_row()
            found += [] if line is None else [line]
            found += self._read_texts(again)
        if self._format is FileFormat.CSV and self._place is None:
            raise IdFileError(_NO_HEADER if self._has_text else "is empty")
        return found

    def _read_texts(self, texts: Iterable[_RawLine]) -> list[IdLine]:
        found: list[IdLine] = []
        waiting = deque(texts)
        while waiting:
            text = waiting.popleft()
            self._row.append(text)
            self._row_length += len(text.text)
            is_too_long = len(self._row) > _MOST_LINES_OF_A_ROW or self._row_length > _LONGEST_ROW
            # The row is within quotes, and an even number of further quotes does not end them.
            if len(self._row) > 1 and text.quotes % 2 == 0 and not is_too_long:
                continue
            with suppress(_RowGoesOnError):
                is_given_up = is_too_long and len(self._row) > 1
                line, again = self._refuse_quotes() if is_given_up else self._end_row(may_go_on=not is_too_long)
                found += [] if line is None else [line]
                waiting.extendleft(reversed(again))
        return found

    def _end_row(self, *, may_go_on: bool = False) -> tuple[IdLine | None, list[_RawLine]]:
        """Return what the lines of a row say, and those of the lines that are to be read again.

        Raises `_RowGoesOnError` where the row does not end here, and `may_go_on` allows that.
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
            raise IdFileError(f"has a first line that is {fault}" if fault else _NO_HEADER)
        return self._refuse_quotes() if goes_on or len(texts) > 1 else self._refuse(fault)

    def _read_header(self, cells: Sequence[str], delimiter: str) -> bool:
        names = [name.strip() for name in cells]
        if _FIELD not in names:
            return False
        self._place, self._delimiters = names.index(_FIELD), (delimiter,)
        self._widths.add(len(cells))
        return True

    def _read_row(self, cells: Sequence[str], lines: int) -> tuple[IdLine | None, list[_RawLine]]:
        place = self._place or 0
        number = self._row[lines - 1].number
        if place >= len(cells):
            return IdLine(number, None, f"no {_FIELD}"), self._drop_row(lines)
        if "\n" in cells[place].strip():
            return self._refuse_quotes()
        if any(self._could_be_a_row(line.text, cells[place]) for line in self._row[1:lines]):
            return self._refuse(
                "not CSV: a quote on this line is closed on a later one, after lines with ids of their own"
            )
        self._widths.add(len(cells))
        return _check(number, cells[place]), self._drop_row(lines)

    def _could_be_a_row(self, line: str, transaction_id: str) -> bool:
        """Return whether a line within a row's quotes, read alone, is as wide as a row and has another id than it.

        Two quotes that are never closed look like one that is, with all lines between them within it.
        """
        place = self._place or 0
        try:
            (cells,) = csv.reader([line], delimiter=self._delimiters[0])
        except csv.Error:
            return False
        if len(cells) not in self._widths:
            return False
        found = cells[place].strip()
        return found != transaction_id.strip() and is_id(found)

    def _refuse_quotes(self) -> tuple[IdLine, list[_RawLine]]:
        return self._refuse("not CSV: a quote on this line is not closed")

    def _refuse(self, fault: str) -> tuple[IdLine, list[_RawLine]]:
        if self._place is None:
            raise IdFileError(f"has a first line that is {fault}")
        number = self._row[0].number
        return IdLine(number, None, fault), self._drop_row(1)

    def _drop_row(self, lines: int) -> list[_RawLine]:
        """Forget the row, which was read from the first `lines` lines; return the lines after these."""
        rest = self._row[lines:]
        self._row, self._row_length = [], 0
        return rest


class _RowGoesOnError(Exception):
    """A row of a CSV does not end with the lines that are there."""


def _offer(lines: Iterable[str]) -> Iterator[str]:
    yield from lines
    raise _RowGoesOnError


class Loading:
    """Counts what becomes of a file's lines, while their ids are registered some at a time.

    Each line is counted once: as `loaded` where it is the first with its id, and that is registered with the deployment
    now; as `repeated` where it names such an id once more; as `faulty` where it is wrong, or the id is another
    deployment's.
    """

    def __init__(self) -> None:
        self.loaded = 0
        self.repeated = 0
        self.faulty = 0
        self._known: set[str] = set()
        self._places: dict[str, list[int]] = {}
        self._bad: list[IdLine] = []
        self._pending = 0

    @property
    def pending(self) -> int:
        """How many lines were taken since the last `settle`."""
        return self._pending

    @property
    def ids(self) -> list[str]:
        """The ids that are to be registered now."""
        return list(self._places)

    def add(self, lines: Iterable[IdLine]) -> None:
        """Take lines, whose ids wait to be registered."""
        for line in lines:
            self._pending += 1
            if line.transaction_id is None:
                self._bad.append(line)
            elif line.transaction_id in self._known:
                self.repeated += 1
            else:
                self._places.setdefault(line.transaction_id, []).append(line.number)

    def settle(self, elsewhere: Collection[str]) -> list[IdLine]:
        """Note that the ids are registered, except those `elsewhere`; return the faulty lines, in order."""
        bad = self._bad
        for transaction_id, (first, *others) in self._places.items():
            if transaction_id in elsewhere:
                bad += [IdLine(number, transaction_id, "belongs to another deployment") for number in (first, *others)]
            else:
                self.loaded += 1
                self.repeated += len(others)
                self._known.add(transaction_id)
        self.faulty += len(bad)
        self._places, self._bad, self._pending = {}, [], 0
        return sorted(bad, key=lambda line: line.number)


def _read_json_line(number: int, line: str) -> IdLine:
    try:
        row = from_json(line)
    except ValueError:
        return IdLine(number, None, "not JSON")
    if not isinstance(row, dict) or not isinstance(row.get(_FIELD), str):
        return IdLine(number, None, f'not an object with a text "{_FIELD}"')
    return _check(number, row[_FIELD])


def _check(number: int, text: str) -> IdLine:
    transaction_id = text.strip()
    if is_id(transaction_id):
        return IdLine(number, transaction_id)
    return IdLine(number, None, f"{_FIELD} must be {ID_RULE}")
