"""The command line: `voicetx`.

Each module holds the commands of one subject. `main` runs a command, and is the one place that turns an error into a
sentence and a non-zero exit status.
"""

import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from voicetx import __version__
from voicetx.access.users import AdministrationError
from voicetx.campaigns.deployments import DeploymentError
from voicetx.cli import config, database, deployments, listings, retention, send, serve, simulate, transactions, users
from voicetx.cli.output import CommandError, complain
from voicetx.settings import describe_faults
from voicetx.storage.migrations import SchemaOutdated
from voicetx.storage.store import DatabaseUnfit, StoreUnavailable, ValueRefused

app = typer.Typer(
    name="voicetx",
    help="The service that campaign dialers report the outcome of every call to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"voicetx {__version__}")
        raise typer.Exit


@app.callback()
def _read_options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and end.")
    ] = False,
) -> None:
    """Handle the options that stand before the command."""


app.command("serve")(serve.serve)
app.command("config")(config.show_config)
app.command("demo")(serve.demo)
app.command("send")(send.send)
app.command("simulate")(simulate.simulate)
app.add_typer(database.app, name="db", help="The database: its schema, and a backup.")
app.add_typer(users.users, name="user", help="API users and what they may do.")
app.add_typer(users.keys, name="key", help="The secret keys of API users.")
deployments.app.command("missing")(listings.list_missing)
deployments.app.command("export")(listings.export)
deployments.app.command("receipts")(listings.find_held)
app.add_typer(deployments.app, name="deployment", help="Deployments and their transactions.")
app.add_typer(transactions.app, name="transaction", help="Transactions and their history.")
app.command("purge")(retention.purge)
app.command("erase")(retention.erase)
app.add_typer(retention.audit, name="audit", help="What was purged and erased, and by whom.")


def main() -> None:
    """Run the command that was typed."""
    try:
        app()
    except (AdministrationError, DeploymentError, SchemaOutdated, CommandError) as error:
        complain(str(error))
    except ValidationError as error:
        for sentence in describe_faults(error):
            complain(sentence)
    except DatabaseUnfit as error:
        complain(f"{error}.")
    except StoreUnavailable as error:
        complain(f"The database cannot be used: {error}. VOICETX_DATABASE_URL says where it is.")
    except ValueRefused as error:
        complain(f"The database refused this: {error}.")
    except UnicodeDecodeError:
        complain("A file that was read is not UTF-8. Is it .env, in this folder?")
    except OSError as error:
        complain(f"{error.filename or 'The system'}: {error.strerror or error}.")
    else:
        return
    sys.exit(1)
