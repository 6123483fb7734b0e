"""Write to the database when secret keys were last used; until then, `voicetx.counting.activity` keeps it in memory."""

from collections.abc import Mapping

from sqlalchemy import Connection, bindparam, or_, update

from voicetx.storage.schema import api_secret


def note_keys(connection: Connection, keys: Mapping[bytes, int]) -> None:
    """Note when secret keys, given by their digests, were last used; a later use that is already noted stays."""
    columns = api_secret.c
    is_later = or_(columns.last_used_at_ms.is_(None), columns.last_used_at_ms < bindparam("minute_ms"))
    noted = update(api_secret).where(columns.digest == bindparam("secret_digest"), is_later)
    connection.execute(
        noted.values(last_used_at_ms=bindparam("minute_ms")),
        # Always in the same order, so that two processes never wait for each other.
        [{"secret_digest": digest, "minute_ms": minute_ms} for digest, minute_ms in sorted(keys.items())],
    )
