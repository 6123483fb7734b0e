"""`voicetx deployment`: make campaign runs and register their transactions, by file or by number."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, cast
from zoneinfo import ZoneInfo

import typer
from sqlalchemy import Connection

from voicetx.campaigns.deployments import (
    Deployment,
    create_deployment,
    find_deployment,
    list_deployments,
    require_deployment,
)
from voicetx.campaigns.id_files import FileFormat, IdLine, Loading, guess_encoding, guess_format, read_lines
from voicetx.campaigns.registration import mint_transactions, register_transactions
from voicetx.cli.output import (
    AsJson,
    CommandError,
    complain,
    follow_progress,
    print_json,
    print_table,
    printable,
    read,
    run_on_store,
    write,
)
from voicetx.contract.codes import CALL_STATES, DROP_CODES
from voicetx.reading.reports import DeploymentReport, Durations, describe_deployment, report_deployment
from voicetx.settings import Settings, check_time_zone
from voicetx.storage.store import Store
from voicetx.times import format_minute, format_time

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)

_CHUNK = 10_000

Id = Annotated[str, typer.Argument(metavar="ID", help="The deployment's id.")]


@app.command("create")
def create(
    deployment_id: Id,
    name: Annotated[str | None, typer.Option(help="A name for people; the id, where none is given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a deployment."""

    def work(connection: Connection) -> Deployment:
        create_deployment(connection, deployment_id, name)
        return find_deployment(connection, deployment_id)

    made = write(work)
    if as_json:
        print_json(_describe(made))
    else:
        typer.echo(f"Deployment {made.deployment_id} is there. Register its transactions: voicetx deployment load")


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the deployments, oldest first."""
    rows = [_describe(found) for found in read(list_deployments)]
    if as_json:
        print_json(rows)
    else:
        print_table(("id", "name", "transactions", "reported", "created_at"), rows)


@app.command("show")
def show(
    deployment_id: Id,
    time_zone: Annotated[str | None, typer.Option(help="Where its times are read, such as Europe/Berlin.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a deployment's numbers; docs/reports.md says how each is defined."""
    zone = _find_zone(time_zone)

    def work(connection: Connection) -> tuple[Deployment, DeploymentReport | None]:
        return find_deployment(connection, deployment_id), report_deployment(connection, deployment_id)

    found, report = read(work)
    assert report is not None  # noqa: S101 - it was found
    if as_json:
        print_json({**_describe(found), "report": describe_deployment(report, zone)})
    else:
        _print_report(report, zone)


def _find_zone(time_zone: str | None) -> ZoneInfo:
    try:
        return ZoneInfo(check_time_zone(time_zone) if time_zone is not None else Settings().timezone)
    except ValueError as error:
        raise CommandError(f"That won't do: {error}.") from error


def _print_report(report: DeploymentReport, zone: ZoneInfo) -> None:
    rate = report.answer_rate
    for name, value in (
        ("id", report.deployment_id),
        ("name", printable(report.name)),
        ("created_at", format_time(report.created_at_ms, zone)),
        ("transactions", f"{report.transactions:,}"),
        ("reported", f"{report.reported:,} ({report.unfinished:,} unfinished, {report.inconsistent:,} inconsistent)"),
        ("unreported", f"{report.unreported:,}"),
        ("answered", f"{report.answered:,}" + (f" ({rate:.1%} of those finished)" if rate is not None else "")),
        ("talk", _tell(report.talk)),
        ("transfers", _tell(report.transfers)),
        ("updates", f"{report.updates:,}{_tell_minutes(report.updates_by_minute, zone)}"),
    ):
        typer.echo(f"{name:<14}{value}")
    tables: list[tuple[str, Sequence[tuple[Any, ...]]]] = [
        ("meaning", list(report.meanings.items())),
        (
            "call-state",
            [(f"{state} {CALL_STATES[state].text}", count) for state, count in report.by_call_state.items()],
        ),
        (
            "drop-code",
            [
                (f"{code} {DROP_CODES[code].text} - {DROP_CODES[code].meaning}", count)
                for code, count in report.by_drop_code.items()
            ],
        ),
        ("times-attempted", list(report.attempts.items())),
        ("key pressed", list(report.key_presses.items())),
    ]
    for title, counts in tables:
        _print_counts(title, "transactions" if title != "key pressed" else "presses", counts)
    _print_counts("API user", "updates", [(printable(name), count) for name, count in report.senders.items()])


def _print_counts(title: str, what: str, counts: Iterable[tuple[Any, ...]]) -> None:
    rows = [{title: item, what: f"{count:,}"} for item, count in counts if count]
    if rows:
        typer.echo()
        print_table((title, what), rows, right={what})


def _tell(durations: Durations) -> str:
    if not durations.count:
        return "none"
    return (
        f"{durations.count:,}, {durations.total_seconds:,} s in all, median {durations.median_seconds:,} s,"
        f" nine in ten within {durations.p90_seconds:,} s"
    )


def _tell_minutes(updates: Mapping[int, int], zone: ZoneInfo) -> str:
    if not updates:
        return ""
    busiest = max(updates, key=lambda minute: updates[minute])
    first, last, most = (format_minute(minute, zone) for minute in (min(updates), max(updates), busiest))
    return f", {first} to {last}, at most {updates[busiest]:,} a minute ({most})"


@app.command("mint")
def mint(
    deployment_id: Id,
    count: Annotated[int, typer.Argument(min=1, max=1_000_000, help="How many.")],
    as_json: AsJson = False,
) -> None:
    """Register transactions with new ids and print the ids, one a line (with --json, as `load` reads them)."""
    while count > 0:
        share = min(count, _CHUNK)
        for transaction_id in write(
            lambda connection: mint_transactions(connection, deployment_id, share)  # noqa: B023 - run at once
        ):
            typer.echo(f'{{"transaction-id":"{transaction_id}"}}' if as_json else transaction_id)
        count -= share


@app.command("load")
def load(
    deployment_id: Id,
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV or NDJSON; - is standard input.")],
    file_format: Annotated[
        FileFormat | None, typer.Option("--format", help="csv or ndjson; told by the file's name, else its start.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Register the transactions that a file names; may be stopped and run again.

    NDJSON has {"transaction-id": ...} on each line, CSV a header with transaction-id, and commas, semicolons or tabs.
    UTF-8, or UTF-16 with its mark. Bad lines are named and the rest is loaded; the exit status is then 1.
    """
    read(lambda connection: require_deployment(connection, deployment_id))
    with _open(file) as source:
        lines = _read(source, file, file_format)
        loading = run_on_store(lambda store: _load(store, deployment_id, lines))
    if as_json:
        counts = {"loaded": loading.loaded, "repeated": loading.repeated, "faults": loading.faulty}
        print_json({"deployment": deployment_id, **counts})
    else:
        again = f"; {loading.repeated:,} lines name one of them again" if loading.repeated else ""
        typer.echo(f"{loading.loaded:,} transactions are registered with {deployment_id}{again}.")
    if loading.faulty:
        complain(f"{loading.faulty:,} lines were not loaded.")
        raise typer.Exit(1)


@contextmanager
def _open(file: str) -> Iterator[TextIO]:
    """Open a file, or standard input, in the encoding that its mark names; lines end as they are written."""
    with ExitStack() as stack:
        source = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
        buffered = cast("BufferedReader", source)
        text = TextIOWrapper(buffered, encoding=guess_encoding(buffered.peek(2)), errors="replace", newline="")
        stack.callback(text.detach)  # standard input is not ours to close
        yield text


def _read(source: TextIO, file: str, file_format: FileFormat | None) -> Iterator[IdLine]:
    lines: Iterable[str] = source
    if file_format is None:
        suffix = Path(file).suffix.lower()
        if suffix in {".csv", ".tsv"}:
            file_format = FileFormat.CSV
        elif suffix in {".ndjson", ".jsonl", ".json"}:
            file_format = FileFormat.NDJSON
        else:
            first = next(source, "")
            file_format = guess_format(first)
            lines = chain([first] if first else [], source)
    return read_lines(lines, file_format)


async def _load(store: Store, deployment_id: str, lines: Iterator[IdLine]) -> Loading:
    """Register chunk by chunk, each in its own transaction; return how many ids are registered, and how many faults."""
    loading = Loading()
    with follow_progress(None) as advance:
        while chunk := list(islice(lines, _CHUNK)):
            loading.add(chunk)
            elsewhere = await store.write(
                lambda connection: register_transactions(connection, deployment_id, loading.ids)
            )
            for line in loading.settle(elsewhere):
                whose = f"{line.transaction_id} " if line.transaction_id is not None else ""
                complain(f"line {line.number}: {whose}{line.fault}")
            advance(len(chunk))
    return loading


def _describe(found: Deployment) -> dict[str, Any]:
    return {
        "id": found.deployment_id,
        "name": found.name,
        "transactions": found.transactions,
        "reported": found.reported,
        "created_at": format_time(found.created_at_ms),
    }
