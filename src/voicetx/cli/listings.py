"""`voicetx deployment missing`, `export` and `receipts`: transactions one by one, for people and for programs.

Whoever has the database sees what is personal, as with `voicetx transaction show`. Lists are read page by page, so that
they may be of any length and run beside a service that writes.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import orjson
import typer

from voicetx.campaigns import deployments
from voicetx.cli.output import AsJson, CommandError, complain, read_age, run_on_store
from voicetx.contract.codes import WireCallState, WireDropCode
from voicetx.contract.ids import is_id
from voicetx.reading.exports import ExportFormat, begin_export, describe_receipt, render_rows
from voicetx.reading.listings import Filters, ListedTransaction, find_receipts, list_transactions, match_missing
from voicetx.storage.statements import find_complete_until
from voicetx.storage.store import Store
from voicetx.times import format_time, read_time

_ROWS_A_PAGE = 1_000
_RECEIPTS_AT_ONCE = 500
_WITH_DIGEST = re.compile(r"(.*),([0-9a-fA-F]{32})")

Id = Annotated[str, typer.Argument(metavar="ID", help="The deployment's id.")]


def list_missing(
    deployment_id: Id,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="For how long nothing was heard, such as 30m, 12h or 2d.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the transactions never reported, or whose report leaves open how the call ended (with --json, NDJSON)."""
    age_ms = read_age(older_than, "mhd") if older_than is not None else 0
    filters = match_missing(age_ms)
    head = "" if as_json else f"{'heard of':<26}{'call-state':<12}{'drop-code':<11}transaction-id\n"

    def show(rows: Sequence[ListedTransaction]) -> None:
        if as_json:
            _print_bytes(render_rows(rows, ExportFormat.NDJSON))
            return
        for row in rows:
            heard = format_time(row.updated_at_ms) if row.updated_at_ms is not None else "never"
            state, code = row.fields.get("call-state", ""), row.fields.get("drop-code", "")
            typer.echo(f"{heard:<26}{state:<12}{code:<11}{row.transaction_id}")

    count, _ = _walk(deployment_id, filters, show, head.encode())
    if not as_json:
        complain(f"The outcome of {count:,} transactions of {deployment_id} is missing.")


def export(  # noqa: PLR0913 - an option each
    deployment_id: Id,
    *,
    export_format: Annotated[
        ExportFormat | None, typer.Option("--format", help="csv or ndjson, which it is where nothing is said.")
    ] = None,
    call_state: Annotated[WireCallState | None, typer.Option()] = None,
    drop_code: Annotated[WireDropCode | None, typer.Option()] = None,
    reported: Annotated[bool | None, typer.Option("--reported/--unreported")] = None,
    finished: Annotated[bool | None, typer.Option("--finished/--unfinished")] = None,
    inconsistent: Annotated[bool | None, typer.Option("--inconsistent/--consistent")] = None,
    updated_since: Annotated[
        str | None, typer.Option(metavar="TIME", help="RFC 3339, such as 2026-01-31T08:00:00Z.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a deployment's transactions, one on each line, in the order of their ids.

    To follow changes, ask the next time with --updated-since the instant that is said at the end. What a spreadsheet
    would take for a formula has an apostrophe before it in the CSV, phone numbers with a plus among them: programs are
    better off with NDJSON.
    """
    if as_json and export_format is ExportFormat.CSV:
        raise CommandError("CSV is no JSON: ask for one of them.")
    export_format = export_format or ExportFormat.NDJSON
    try:
        updated_since_ms = read_time(updated_since) if updated_since is not None else None
    except ValueError as error:
        raise CommandError(f"That won't do: {error}.") from error
    filters = Filters(
        call_state=call_state,
        drop_code=drop_code,
        is_reported=reported,
        is_finished=finished,
        is_inconsistent=inconsistent,
        updated_since_ms=updated_since_ms,
    )
    _, complete_until_ms = _walk(
        deployment_id, filters, lambda rows: _print_bytes(render_rows(rows, export_format)), begin_export(export_format)
    )
    complain(f"All changes until {format_time(complete_until_ms)} are in it: ask for later ones with --updated-since.")


def find_held(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="An id, or id,digest, on each line; - is standard input.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say which updates are held; prints the lines of those that are not, to be sent again (with --json, all: NDJSON).

    An id is held where anything was reported of it, with a digest where that very update was.
    """
    source = sys.stdin if file == "-" else Path(file).open(encoding="utf-8-sig", errors="replace")  # noqa: SIM115 - closed below
    try:
        lines = (line for number, text in enumerate(source, start=1) if (line := _read_line(number, text)) is not None)
        asked, held, faults = run_on_store(lambda store: _find_held(store, lines, as_json=as_json))
    finally:
        source.close()
    if not asked:
        complain("Nothing was asked for.")
    else:
        complain(f"{asked - held:,} of {asked:,} are not held." if held < asked else f"All of {asked:,} are held.")
    if faults:
        complain(f"{faults:,} lines hold no transaction id.")
        raise typer.Exit(1)


class _Line(NamedTuple):
    number: int
    text: str
    wanted: tuple[str, bytes | None] | None


def _read_line(number: int, text: str) -> _Line | None:
    text = text.strip()
    found = _WITH_DIGEST.fullmatch(text)
    transaction_id = found[1] if found is not None else text
    if not text:
        return None
    if not is_id(transaction_id):
        return _Line(number, text, None)
    return _Line(number, text, (transaction_id, bytes.fromhex(found[2]) if found is not None else None))


async def _find_held(store: Store, lines: Iterator[_Line], *, as_json: bool) -> tuple[int, int, int]:
    """Print receipts, or the lines of what is not held; return how many were asked for, are held, and are at fault."""
    asked = held = faults = 0
    while chunk := list(islice(lines, _RECEIPTS_AT_ONCE)):
        for line in chunk:
            if line.wanted is None:
                complain(f"line {line.number}: no transaction id")
                faults += 1
        wanted = [(line.text, line.wanted) for line in chunk if line.wanted is not None]
        receipts = await store.read(partial(find_receipts, wanted=[asked_for for _, asked_for in wanted]))
        for (text, _), receipt in zip(wanted, receipts, strict=True):
            asked += 1
            held += receipt.is_held
            if as_json:
                _print_bytes(orjson.dumps(describe_receipt(receipt), option=orjson.OPT_APPEND_NEWLINE))
            elif not receipt.is_held:
                typer.echo(text)
    return asked, held, faults


def _walk(
    deployment_id: str, filters: Filters, show: Callable[[Sequence[ListedTransaction]], None], head: bytes = b""
) -> tuple[int, int]:
    """Show a deployment's transactions page by page, after a head.

    Return how many there were, and up to when none is missing.
    """

    async def walk(store: Store) -> tuple[int, int]:
        await store.read(partial(deployments.require_deployment, deployment_id=deployment_id))
        until_ms = await store.read(partial(find_complete_until, settle_seconds=store.settle_seconds))
        _print_bytes(head)
        count, after = 0, ""
        while True:
            page = await store.read(
                partial(
                    list_transactions, deployment_id=deployment_id, filters=filters, after=after, limit=_ROWS_A_PAGE
                )
            )
            show(page.rows)
            count += len(page.rows)
            if page.next is None:
                return count, until_ms
            after = page.next

    return run_on_store(walk)


def _print_bytes(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()
