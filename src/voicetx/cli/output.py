"""How commands reach the database and say what they found: tables for people, JSON for programs, complaints apart."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from sqlalchemy import Connection

from voicetx.settings import Settings
from voicetx.storage import migrations
from voicetx.storage.store import Store, open_store

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_UNITS = {
    "m": ("minutes", 60_000, "30m"),
    "h": ("hours", 3_600_000, "12h"),
    "d": ("days", 86_400_000, "90d"),
    "w": ("weeks", 604_800_000, "2w"),
}

_errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class CommandError(Exception):
    """A command cannot do what was asked; the text is a sentence."""


def complain(sentence: str) -> None:
    """Print a sentence on standard error."""
    _errors.print(sentence)


def run_on_store(work: Callable[[Store], Awaitable[T]]) -> T:
    """Run `work` on the settings' database, which has to be there with this release's schema, and return its result.

    Raises `DatabaseMissing` and `SchemaOutdated`: a command for users or deployments makes no database.
    """

    async def run() -> T:
        store = open_store(Settings())
        try:
            await migrations.check(store)
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def write(work: Callable[[Connection], T]) -> T:
    """Run `work` in a transaction on the settings' database, as `run_on_store` does, and return its result."""
    return run_on_store(lambda store: store.write(work))


def read(work: Callable[[Connection], T]) -> T:
    """Run `work`, which only reads, on the settings' database, without waiting for those who write."""
    return run_on_store(lambda store: store.read(work))


def print_json(value: Any) -> None:
    """Print JSON on standard output, readable, every character of it ASCII-safe for pipes only if it was so."""
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


def print_table(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], right: Collection[str] = frozenset()
) -> None:
    """Print rows as a table; the columns name the rows' keys, and those of `right` are numbers.

    A row is one line and nothing in it is cut, on a terminal of whatever width too: what is shown can be copied.
    """
    cells = [list(columns), *([_show(row[name]) for name in columns] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (
            " " * (width - cell_len(cell)) + cell if name in right else cell + " " * (width - cell_len(cell))
            for name, cell, width in zip(columns, line, widths, strict=True)
        )
        typer.echo("  ".join(padded).rstrip())


def _show(value: Any) -> str:
    if value is None:
        return ""
    return printable(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def printable(text: str) -> str:
    """Return the text with control characters escaped: what a dialer sent must not steer a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def read_age(text: str, units: str = "hdw") -> int:
    """Return an age such as 12h in milliseconds, in one of these units; raises `CommandError` for what is none."""
    age = re.fullmatch(rf"([1-9][0-9]{{0,4}})([{units}])", text.strip())
    if age is None:
        *names, last = (_UNITS[unit][0] for unit in units)
        *examples, other = (_UNITS[unit][2] for unit in units)
        raise CommandError(
            f"An age is a whole number of {', '.join(names)} or {last}, such as {', '.join(examples)} or {other}."
        )
    return int(age[1]) * _UNITS[age[2]][1]


@contextmanager
def follow_progress(total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal (on standard error), and nothing elsewhere; call what is yielded with each step made."""
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn() if total is None else TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda steps: progress.advance(task, steps)
