"""`voicetx purge`, `voicetx erase` and `voicetx audit`: what is not kept, and the records of it.

Each may run beside services that write, be stopped with Ctrl-C, and be run again.
"""

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import typer

from voicetx.campaigns.audit import Advance, AuditRecord, list_audit_records
from voicetx.campaigns.deployments import require_deployment
from voicetx.campaigns.erase import StillReported, erase_number
from voicetx.campaigns.purge import purge_transactions
from voicetx.cli.output import (
    AsJson,
    CommandError,
    complain,
    follow_progress,
    print_json,
    read,
    read_age,
    run_on_store,
)
from voicetx.contract import privacy
from voicetx.settings import Settings
from voicetx.storage.store import Store
from voicetx.times import format_time

T = TypeVar("T")

audit = typer.Typer(no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]


def purge(
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Such as 90d, 12h or 2w.")],
    deployment: Annotated[str | None, typer.Option(metavar="ID", help="Of this deployment only.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete transactions, with their history, whose last update is older than that.

    Those that were never reported go by when they were registered. Without --deployment, empty deployments of that age
    and expired access tokens go too.
    """
    before_ms = time.time_ns() // 1_000_000 - read_age(older_than)
    if deployment is not None:
        read(lambda connection: require_deployment(connection, deployment))
    purged = _run(
        lambda store, advance: purge_transactions(
            store, before_ms, deployment_id=deployment, is_dry_run=dry_run, advance=advance
        )
    )
    if as_json:
        scope = {"before": format_time(before_ms), "deployment": deployment, "dry_run": dry_run}
        print_json(scope | asdict(purged))
        return
    typer.echo(
        f"{'Would delete' if dry_run else 'Deleted'} {purged.transactions:,} transactions with"
        f" {purged.updates:,} updates, {purged.deployments:,} deployments and {purged.access_tokens:,} access tokens."
    )


def erase(
    number: Annotated[
        str, typer.Option(help="A phone number, however it is written; - reads it from standard input, out of sight.")
    ],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Mask a phone number in every transaction and update; counts, codes and times stay."""
    try:
        digits = privacy.read_number(sys.stdin.readline() if number == "-" else number)
    except ValueError as error:
        raise CommandError(str(error)) from error
    settle_seconds = Settings().commit_timeout_seconds
    try:
        erased = _run(
            lambda store, advance: erase_number(
                store, digits, settle_seconds=settle_seconds, is_dry_run=dry_run, advance=advance
            )
        )
    except StillReported as error:
        raise CommandError("The number is still being reported. Stop that, and run this again.") from error
    if as_json:
        print_json({"dry_run": dry_run} | asdict(erased))
    else:
        typer.echo(
            f"{'Would mask' if dry_run else 'Masked'} the number in {erased.transactions:,} transactions"
            f" and {erased.updates:,} updates."
        )
    if erased.kept_ids:
        complain(f"{erased.kept_ids:,} transaction ids hold the number. An id is never changed: purge them in time.")


@audit.callback()
def group() -> None:
    """Audit records: what was purged and erased, and by whom."""


@audit.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List what was purged and erased, oldest first."""
    rows = [_describe(record) for record in read(list_audit_records)]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        subject, counts = (
            " ".join(f"{name}={value}" for name, value in row[part].items() if value is not None)
            for part in ("subject", "counts")
        )
        end = "" if row["ended_at"] is not None else " (running, or stopped)"
        typer.echo(f"{row['started_at']}  {row['action']} by {row['by']}: {subject}: {counts or 'nothing'}{end}")


def _describe(record: AuditRecord) -> dict[str, Any]:
    subject = dict(record.subject)
    if "before_ms" in subject:
        subject = {"before": format_time(subject.pop("before_ms")), **subject}
    return {
        "started_at": format_time(record.started_at_ms),
        "ended_at": format_time(record.ended_at_ms) if record.ended_at_ms is not None else None,
        "action": record.action,
        "by": record.operator,
        "subject": subject,
        "counts": record.counts,
    }


def _run(work: Callable[[Store, Advance], Awaitable[T]]) -> T:
    """Run work of many transactions on the settings' database, with its progress on a terminal."""

    async def run(store: Store) -> T:
        with follow_progress(None) as advance:
            return await work(store, advance)

    return run_on_store(run)
