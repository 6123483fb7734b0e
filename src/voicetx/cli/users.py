"""`voicetx user` and `voicetx key`: API users, their grants and secret keys.

A secret key is printed when it is made and never again. A running service heeds a change within
VOICETX_CREDENTIAL_CACHE_SECONDS.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from sqlalchemy import Connection

from voicetx.access import users as api_users
from voicetx.access.users import ApiUser, Grant, SecretKey
from voicetx.cli.output import AsJson, print_json, print_table, printable, read, write
from voicetx.reading.reports import describe_user, report_users
from voicetx.times import format_time

users = typer.Typer(no_args_is_help=True)
keys = typer.Typer(no_args_is_help=True)

User = Annotated[str, typer.Argument(metavar="USER", help="An API user's name or API key id.")]
GrantArgument = Annotated[Grant, typer.Argument(metavar="GRANT", help="One of: " + ", ".join(Grant))]


@users.command("add")
def add_user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for people; no two users share one.")],
    grant: Annotated[list[Grant] | None, typer.Option(help="What it may do; may be repeated.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="Where its call times are read, such as Europe/Berlin.")] = None,
    limit: Annotated[str | None, typer.Option(help="How many calls it may make, such as 100/second.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API user with a first secret key, which is shown now and never again."""
    user, secret_key = write(
        lambda connection: api_users.add_user(connection, name, grant or (), time_zone=time_zone, call_limit=limit)
    )
    if as_json:
        print_json(
            {
                "api_key_id": str(user.api_key_id),
                "name": user.name,
                "grants": sorted(user.grants),
                "secret_key": secret_key,
            }
        )
        return
    typer.echo(f"API key id  {user.api_key_id}")
    typer.echo(f"Secret key  {secret_key}")
    typer.echo(f"Grants      {', '.join(sorted(user.grants)) or 'none yet: voicetx user grant'}")
    typer.echo("The secret key is shown this once: keep it.")


@users.command("list")
def list_users(as_json: AsJson = False) -> None:
    """List the API users."""
    rows = [_describe(user) for user in read(api_users.list_users)]
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "api_key_id", "grants", "keys", "limit", "time_zone"), rows)


@users.command("show")
def show_user(user: User, as_json: AsJson = False) -> None:
    """Show an API user, and when each of its secret keys was made and last used (to the minute)."""
    found = read(lambda connection: api_users.find_user(connection, user))
    row = _describe(found)
    secret_keys = [_describe_key(key) for key in found.keys]
    if as_json:
        print_json({**row, "secret_keys": secret_keys})
        return
    for name, value in row.items():
        shown = " ".join(str(item) for item in value) if isinstance(value, list) else value
        typer.echo(f"{name:<12}{'' if shown is None else shown}".rstrip())
    for key in secret_keys:
        used = key["last_used_at"]
        typer.echo(f"key {key['slot']:<8}made {key['created_at']}, {f'last used {used}' if used else 'never used'}")


@users.command("activity")
def show_activity(
    days: Annotated[int, typer.Option(min=1, max=366, help="How many, today's among them (UTC).")] = 7,
    as_json: AsJson = False,
) -> None:
    """Show what became of each API user's calls on the last days: recorded, repeated, stale, refused by code."""
    today = datetime.now(UTC).date()
    rows = [describe_user(found) for found in read(lambda connection: report_users(connection, days, today))]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        row["api_user"] = printable(row["api_user"])
        row["refused"] = ", ".join(f"{code}: {count:,}" for code, count in row["refused"].items())
    columns = ("api_user", "recorded", "repeated", "stale", "refused")
    print_table(columns, rows, right={"recorded", "repeated", "stale"})


@users.command("grant")
def grant_user(user: User, grant: GrantArgument) -> None:
    """Allow an API user one thing more."""
    _change_grants(user, added={grant})


@users.command("revoke")
def revoke_user(user: User, grant: GrantArgument) -> None:
    """Allow an API user one thing less."""
    _change_grants(user, removed={grant})


@users.command("delete")
def delete_user(user: User) -> None:
    """Delete an API user with its keys and tokens; what it reported stays."""
    write(lambda connection: api_users.delete_user(connection, api_users.find_user(connection, user)))
    typer.echo(f"{user} is deleted.")


@keys.command("add")
def add_key(user: User, as_json: AsJson = False) -> None:
    """Make a second secret key beside the first, to change over to without downtime."""
    slot, secret_key = write(lambda connection: api_users.add_key(connection, api_users.find_user(connection, user)))
    if as_json:
        print_json({"slot": slot, "secret_key": secret_key})
        return
    typer.echo(f"Secret key {slot}  {secret_key}")
    typer.echo("It is shown this once: keep it.")


@keys.command("delete")
def delete_key(user: User, slot: Annotated[int, typer.Argument(min=1, max=2, help="1 or 2.")]) -> None:
    """Delete a secret key and the tokens got with it; with key 1 gone, key 2 becomes key 1."""

    def work(connection: Connection) -> ApiUser:
        api_users.delete_key(connection, api_users.find_user(connection, user), slot)
        return api_users.find_user(connection, user)

    left = write(work)
    if slot == 1 and left.key_slots:
        typer.echo(f"Secret key 1 of {left.name} is deleted; key 2 is key 1 now.")
    else:
        typer.echo(f"Secret key {slot} of {left.name} is deleted.")


def _change_grants(user: str, *, added: Iterable[Grant] = (), removed: Iterable[Grant] = ()) -> None:
    def work(connection: Connection) -> ApiUser:
        found = api_users.find_user(connection, user)
        api_users.set_grants(connection, found, found.grants.union(added).difference(removed))
        return api_users.find_user(connection, user)

    changed = write(work)
    typer.echo(f"{changed.name} may: {', '.join(sorted(changed.grants)) or 'nothing'}")


def _describe(user: ApiUser) -> dict[str, Any]:
    return {
        "api_key_id": str(user.api_key_id),
        "name": user.name,
        "grants": sorted(user.grants),
        "keys": list(user.key_slots),
        "limit": user.call_limit,
        "time_zone": user.time_zone,
        "created_at": format_time(user.created_at_ms),
    }


def _describe_key(key: SecretKey) -> dict[str, Any]:
    return {
        "slot": key.slot,
        "created_at": format_time(key.created_at_ms),
        "last_used_at": format_time(key.last_used_at_ms) if key.last_used_at_ms is not None else None,
    }
