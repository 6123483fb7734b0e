"""How alembic reaches the database: on the connection that voicetx hands over, or on one of its own.

`voicetx db upgrade` passes its connection; `alembic` typed by a developer (to write a new version) makes one from
VOICETX_DATABASE_URL.
"""

import asyncio

from alembic import context
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy import Connection

from voicetx.settings import Settings, describe_faults
from voicetx.storage.schema import metadata
from voicetx.storage.store import StoreUnavailable, open_store


def run(connection: Connection) -> None:
    """Run the wanted migrations on `connection`, inside the transaction that it is in."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_type=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_alone() -> None:
    """Run them on a connection of our own."""
    try:
        store = open_store(Settings(), is_patient=True)
    except ValidationError as error:
        raise CommandError(" ".join(describe_faults(error))) from None
    try:
        await store.write(run)
    except StoreUnavailable as error:
        raise CommandError(f"The database cannot be used: {error}.") from None
    finally:
        await store.close()


if (connection := context.config.attributes.get("connection")) is not None:
    run(connection)
else:
    asyncio.run(run_alone())
