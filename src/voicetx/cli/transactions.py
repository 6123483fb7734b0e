"""`voicetx transaction`: what became of a call, and everything that was said of it."""

from typing import Annotated

import typer

from voicetx.cli.output import AsJson, CommandError, print_json, print_table, printable, read
from voicetx.reading.transactions import describe_transaction, report_transaction
from voicetx.times import format_time

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Transactions and their history."""


@app.command("show")
def show_transaction(
    transaction_id: Annotated[str, typer.Argument(metavar="ID", help="The transaction id.")], as_json: AsJson = False
) -> None:
    """Show a transaction as its updates have made it, and the updates, oldest first."""
    report = read(lambda connection: report_transaction(connection, transaction_id))
    if report is None:
        raise CommandError(f"There is no transaction {transaction_id}.")
    if as_json:
        print_json(describe_transaction(report))
        return
    typer.echo(f"{'transaction-id':<20}{report.transaction_id}")
    typer.echo(f"{'deployment':<20}{report.deployment_id}")
    typer.echo(f"{'updates':<20}{report.updates}")
    typer.echo(f"{'inconsistent':<20}{'yes' if report.is_inconsistent else 'no'}")
    for name, value in report.fields.items():
        typer.echo(f"{name:<20}{printable(value)}")
    if report.history:
        typer.echo()
        rows = [
            {
                "received_at": format_time(entry.received_at_ms),
                "api_user": entry.api_user,
                "repeats": entry.repeats,
                "body": printable(entry.body),
            }
            for entry in report.history
        ]
        print_table(("received_at", "api_user", "repeats", "body"), rows, right={"repeats"})
