"""How commands reach the database and say what they found: tables for people, JSON for programs, complaints apart."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Connection

from voicetx import migrations
from voicetx.settings import Settings
from voicetx.store import Store, open_store

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class CommandError(Exception):
    """A command cannot do what was asked; the text is a sentence."""


def complain(sentence: str) -> None:
    """Print a sentence on standard error."""
    _errors.print(sentence)


def run_on_store(work: Callable[[Store], Awaitable[T]]) -> T:
    """Run `work` on the settings' database and return its result; an embedded one is made first."""

    async def run() -> T:
        store = open_store(Settings())
        try:
            await migrations.prepare(store)
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def write(work: Callable[[Connection], T]) -> T:
    """Run `work` in a transaction on the settings' database and return its result; an embedded one is made first."""
    return run_on_store(lambda store: store.write(work))


def print_json(value: Any) -> None:
    """Print JSON on standard output, readable, every character of it ASCII-safe for pipes only if it was so."""
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; the columns name the rows' keys."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if row[name] is None else _show(row[name]) for name in columns))
    Console(highlight=False, markup=False).print(table)


def _show(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


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
