"""API users, their grants and their secret keys: what an administrator makes, changes and deletes.

The command line calls these functions. A running service notices a change when it next looks up a credential
(`voicetx.access.authenticator`). Only the SHA-256 digest of a secret key is stored: a key is 256 random bits, so it
cannot be guessed, and a slow hash would add nothing. Source: docs/contract.md, section 4.
"""

import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select, update

from voicetx.settings import check_limit, check_time_zone
from voicetx.storage.schema import api_secret, api_user

SECRET_PREFIX = "vsk_"  # noqa: S105 - what a secret key begins with, so that scanners find leaked ones
_SLOTS = (1, 2)
_NAME_LENGTH = 128


class Grant(StrEnum):
    """What an API user may be allowed to do."""

    TRANSACTIONS_UPDATE = "transactions:update"
    TRANSACTIONS_READ = "transactions:read"
    TRANSACTIONS_READ_PERSONAL = "transactions:read-personal"
    DEPLOYMENTS_WRITE = "deployments:write"


class AdministrationError(Exception):
    """A request of the administrator cannot be carried out; the text says why, in a sentence."""


@dataclass(frozen=True, slots=True)
class SecretKey:
    """What is known of a secret key; `last_used_at_ms` is exact to the minute, and None if the key was never used."""

    slot: int
    created_at_ms: int
    last_used_at_ms: int | None


@dataclass(frozen=True, slots=True)
class ApiUser:
    """An API user as every step after authentication sees it.

    `time_zone` and `call_limit` are None if the defaults of the settings apply. `keys` are its secret keys; they are
    not read when a request is authenticated.
    """

    api_key_id: UUID
    name: str
    grants: frozenset[Grant]
    time_zone: str | None = None
    call_limit: str | None = None
    created_at_ms: int = 0
    keys: tuple[SecretKey, ...] = ()

    @property
    def key_slots(self) -> tuple[int, ...]:
        """Which of the slots 1 and 2 have a secret key."""
        return tuple(key.slot for key in self.keys)


def add_user(
    connection: Connection,
    name: str,
    grants: Iterable[Grant],
    *,
    time_zone: str | None = None,
    call_limit: str | None = None,
) -> tuple[ApiUser, str]:
    """Make an API user with a first secret key; return both. The key cannot be read later.

    Raises `AdministrationError` for a name that is taken or empty, an unknown time zone, or a malformed limit.
    """
    name = name.strip()
    if not 1 <= len(name) <= _NAME_LENGTH:
        raise AdministrationError(f"A name has 1 to {_NAME_LENGTH} characters.")
    try:
        values = {
            "time_zone": check_time_zone(time_zone) if time_zone is not None else None,
            "call_limit": check_limit(call_limit) if call_limit is not None else None,
        }
    except ValueError as error:
        raise AdministrationError(f"That won't do: {error}.") from error
    if connection.execute(select(api_user.c.name).where(api_user.c.name == name)).first() is not None:
        raise AdministrationError(f"There is an API user named {name} already.")
    api_key_id = uuid4()
    connection.execute(
        insert(api_user).values(
            api_key_id=api_key_id, name=name, grants=_join(grants), created_at_ms=time.time_ns() // 1_000_000, **values
        )
    )
    secret_key = _insert_key(connection, api_key_id, _SLOTS[0])
    return find_user(connection, str(api_key_id)), secret_key


def list_users(connection: Connection) -> list[ApiUser]:
    """Return every API user, by name."""
    keys: dict[UUID, list[SecretKey]] = {}
    for row in connection.execute(select(api_secret).order_by(api_secret.c.slot)):
        keys.setdefault(row.api_key_id, []).append(_to_key(row))
    return [
        to_user(row, keys.get(row.api_key_id, ()))
        for row in connection.execute(select(api_user).order_by(api_user.c.name))
    ]


def find_user(connection: Connection, name_or_id: str) -> ApiUser:
    """Return the API user with that name or API key id. Raises `AdministrationError` if there is none."""
    row = connection.execute(select(api_user).where(_matches(name_or_id))).one_or_none()
    if row is None:
        raise AdministrationError(f"There is no API user {name_or_id}.")
    keys = connection.execute(
        select(api_secret).where(api_secret.c.api_key_id == row.api_key_id).order_by(api_secret.c.slot)
    )
    return to_user(row, map(_to_key, keys))


def _to_key(row: Row[Any]) -> SecretKey:
    # A key that was made and used within the same minute was made after the beginning of that minute.
    used_ms = None if row.last_used_at_ms is None else max(row.last_used_at_ms, row.created_at_ms)
    return SecretKey(row.slot, row.created_at_ms, used_ms)


def _matches(name_or_id: str) -> ColumnElement[bool]:
    try:
        return api_user.c.api_key_id == UUID(name_or_id)
    except ValueError:
        return api_user.c.name == name_or_id


def set_grants(connection: Connection, user: ApiUser, grants: Iterable[Grant]) -> None:
    """Give an API user these grants and no others."""
    connection.execute(update(api_user).where(api_user.c.api_key_id == user.api_key_id).values(grants=_join(grants)))


def delete_user(connection: Connection, user: ApiUser) -> None:
    """Delete an API user, its secret keys and access tokens; what it reported stays."""
    connection.execute(delete(api_user).where(api_user.c.api_key_id == user.api_key_id))


def add_key(connection: Connection, user: ApiUser) -> tuple[int, str]:
    """Make a second secret key for an API user; return its slot and the key.

    The key cannot be read later. Raises `AdministrationError` if there are two keys already.
    """
    free = [slot for slot in _SLOTS if slot not in user.key_slots]
    if not free:
        raise AdministrationError(f"{user.name} has two secret keys; delete one first.")
    return free[0], _insert_key(connection, user.api_key_id, free[0])


def delete_key(connection: Connection, user: ApiUser, slot: int) -> None:
    """Delete a secret key and the access tokens issued for it. If key 1 is deleted, key 2 becomes key 1.

    Raises `AdministrationError` if there is no key in that slot.
    """
    if slot not in user.key_slots:
        raise AdministrationError(f"{user.name} has no secret key {slot}.")
    mine = api_secret.c.api_key_id == user.api_key_id
    connection.execute(delete(api_secret).where(mine, api_secret.c.slot == slot))
    connection.execute(update(api_secret).where(mine, api_secret.c.slot > slot).values(slot=slot))


def _insert_key(connection: Connection, api_key_id: UUID, slot: int) -> str:
    secret_key = SECRET_PREFIX + secrets.token_urlsafe(32)
    connection.execute(
        insert(api_secret).values(
            digest=digest_credential(secret_key),
            api_key_id=api_key_id,
            slot=slot,
            created_at_ms=time.time_ns() // 1_000_000,
        )
    )
    return secret_key


def _join(grants: Iterable[Grant]) -> str:
    return " ".join(sorted(grants))


def to_user(row: Row[Any], keys: Iterable[SecretKey] = ()) -> ApiUser:
    """Make an `ApiUser` from its row, with the secret keys that the caller has read."""
    return ApiUser(
        api_key_id=row.api_key_id,
        name=row.name,
        grants=frozenset(Grant(grant) for grant in row.grants.split()),
        time_zone=row.time_zone,
        call_limit=row.call_limit,
        created_at_ms=row.created_at_ms,
        keys=tuple(keys),
    )


def digest_credential(credential: str) -> bytes:
    """Return the SHA-256 of a secret key or an access token; nothing else of it is ever stored."""
    return hashlib.sha256(credential.encode()).digest()
