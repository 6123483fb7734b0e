"""Who may do what: API users, their secret keys and access tokens, and the grants they hold.

Second step of an update, after the path and method: `Authenticator.recall` or `authenticate` turns an `authorization`
header into an `ApiUser`. Only SHA-256 digests of credentials are stored or kept in memory; they are 256-bit random, so
no slow hash is needed. The functions on a connection are for those who administer. Source: docs/contract.md, section 4.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, literal, select, update

from voicetx.contract.refusals import Challenge, Refusal, Rejected
from voicetx.counting import activity
from voicetx.settings import Settings, check_limit, check_time_zone
from voicetx.storage.schema import access_token, api_secret, api_user
from voicetx.storage.store import Store, ValueRefused

if TYPE_CHECKING:
    from voicetx.access.throttle import Throttle  # the command line needs none of it and starts faster without

_SECRET_PREFIX = "vsk_"  # noqa: S105 - what a secret key begins with, so that scanners find leaked ones
TOKEN_PREFIX = "vat_"  # noqa: S105 - the same for access tokens
_CREDENTIAL = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # b64token of RFC 6750, section 2.1
_SLOTS = (1, 2)
_NAME_LENGTH = 128
_CACHE_SIZE = 10_000
_MINUTE_MS = 60_000
_KEEP_EXPIRED_MS = 86_400_000  # an expired token stays recognisable for a day: no guess, and not counted as one


class Grant(StrEnum):
    """What an API user may be allowed to do, one grant an API."""

    TRANSACTIONS_UPDATE = "transactions:update"
    TRANSACTIONS_READ = "transactions:read"
    TRANSACTIONS_READ_PERSONAL = "transactions:read-personal"
    DEPLOYMENTS_WRITE = "deployments:write"


class AdministrationError(Exception):
    """What was asked of the API users cannot be done; the text is a sentence for the person who asked."""


@dataclass(frozen=True, slots=True)
class SecretKey:
    """What is known of a secret key; `last_used_at_ms`, to the minute, is None where it never was used."""

    slot: int
    created_at_ms: int
    last_used_at_ms: int | None


@dataclass(frozen=True, slots=True)
class ApiUser:
    """An API user as every step after authentication sees it.

    `time_zone` and `call_limit` are None where the settings' defaults hold. `keys` are its secret keys, for those who
    administer.
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
        """Say which secret keys exist."""
        return tuple(key.slot for key in self.keys)


@dataclass(frozen=True, slots=True)
class Token:
    """An access token, shown once; `expires_in_seconds` from when it was made."""

    access_token: str
    expires_in_seconds: int
    user: ApiUser


@dataclass(frozen=True, slots=True)
class _Found:
    """What the database said of a credential, and until when that is believed (monotonic seconds)."""

    user: ApiUser
    expires_at_ms: int | None
    believed_until: float


class Authenticator:
    """Tells who a credential belongs to, and believes the database for `credential_cache_seconds`.

    So a revocation takes effect in every process within that time. Where a credential is used towards its end, the
    database is asked again meanwhile, so that those who send all the time never wait for it together.

    When a secret key was last used, by itself or by a token got with it, is noted where it is looked up, and kept by
    whoever keeps the process's activity: once a minute, and by others only where no other process has.

    Failed sign-ins are counted by client address and refused past a limit; credentials that were seen to be good are
    exempt, so that one misconfigured dialer does not lock out its neighbours behind the same address.
    """

    def __init__(self, store: Store, settings: Settings, throttle: "Throttle") -> None:
        self._store = store
        self._throttle = throttle
        self._believe_seconds = settings.credential_cache_seconds
        self._token_lifetime_seconds = settings.token_lifetime_seconds
        self._session_lifetime_seconds = settings.session_lifetime_seconds
        self._found: dict[bytes, _Found] = {}
        self._lookups: dict[bytes, asyncio.Task[_Found | None]] = {}
        self._noted: dict[bytes, int] = {}

    def recall(self, credential_digest: bytes) -> ApiUser | None:
        """Return the user of a credential that was looked up a moment ago, or None; waits for nobody."""
        found = self._find_believed(credential_digest)
        return found.user if found is not None and not _has_expired(found) else None

    async def authenticate(self, authorization: bytes | None, address: str) -> ApiUser:
        """Return the API user whose secret key or access token the `authorization` header bears.

        Raises `Rejected` (498), `ThrottleReached` for an address with too many failures, `StoreUnavailable`.
        """
        credential = _read_bearer(authorization) if authorization is not None else None
        if credential is None:
            raise Rejected(Refusal.NOT_SIGNED_IN, challenge=_explain(authorization))
        found = await self._find(credential, address)
        if _has_expired(found):
            raise Rejected(Refusal.NOT_SIGNED_IN, challenge=Challenge.EXPIRED)
        return found.user

    async def issue_token(self, api_key_id: str, secret_key: str, address: str) -> Token:
        """Make an access token for the API user with that key id and secret key (RFC 6749, section 4.4).

        It counts as a call of that user. Raises `Rejected` (498) where the two do not belong together, else as
        `authenticate`.
        """
        user = await self._find_by_key(secret_key, address)
        if not hmac.compare_digest(str(user.api_key_id).encode(), api_key_id.strip().lower().encode()):
            await self._fail(address)
        return await self._issue(user, secret_key, self._token_lifetime_seconds, address)

    async def open_session(self, secret_key: str, address: str) -> Token:
        """Make an access token for the API user with that secret key, for a browser to keep; else as `issue_token`."""
        user = await self._find_by_key(secret_key, address)
        return await self._issue(user, secret_key, self._session_lifetime_seconds, address)

    async def close_session(self, token: str) -> None:
        """Delete an access token; other processes believe it for at most `credential_cache_seconds` more.

        Raises `StoreUnavailable`.
        """
        digest = _digest(token)

        def work(connection: Connection) -> None:
            connection.execute(delete(access_token).where(access_token.c.digest == digest))

        await self._store.write(work)
        if (lookup := self._lookups.get(digest)) is not None:
            await asyncio.wait([lookup])  # it may have read the token just before
        self._found.pop(digest, None)

    async def _find_by_key(self, secret_key: str, address: str) -> ApiUser:
        if not secret_key.startswith(_SECRET_PREFIX):
            await self._fail(address)
        return (await self._find(secret_key.encode(), address)).user

    async def _issue(self, user: ApiUser, secret_key: str, lifetime_seconds: int, address: str) -> Token:
        if (admission := self._throttle.admit(user.api_key_id, user.call_limit)) is not None:
            await admission
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now_ms = _now_ms()
        secret_digest = _digest(secret_key)

        def work(connection: Connection) -> None:
            connection.execute(delete(access_token).where(match_expired_tokens()))
            connection.execute(
                insert(access_token).values(
                    digest=_digest(token),
                    secret_digest=secret_digest,
                    expires_at_ms=now_ms + lifetime_seconds * 1000,
                )
            )

        try:
            await self._store.write(work)
        except ValueRefused:
            # The secret key was revoked since it was looked up.
            self._found.pop(secret_digest, None)
            await self._fail(address)
        return Token(token, lifetime_seconds, user)

    async def _find(self, credential: bytes, address: str) -> _Found:
        digest = hashlib.sha256(credential).digest()
        known = self._find_believed(digest)
        if known is not None:
            return known
        if digest not in self._found:
            self._throttle.check_sign_in(address)
        lookup = self._share_lookup(digest, is_token=credential.startswith(TOKEN_PREFIX.encode()))
        # Shielded: callers share it, and one that hangs up must not take it away from the others.
        found = await asyncio.shield(lookup)
        if found is None:
            await self._fail(address, Challenge.UNKNOWN if _CREDENTIAL.fullmatch(credential) else Challenge.MALFORMED)
        return found

    def _find_believed(self, digest: bytes) -> _Found | None:
        found = self._found.get(digest)
        if found is None:
            return None
        left_seconds = found.believed_until - time.monotonic()
        if left_seconds <= 0:
            return None
        if left_seconds < self._believe_seconds / 4:
            self._share_lookup(digest, is_token=found.expires_at_ms is not None)
        return found

    def _share_lookup(self, digest: bytes, *, is_token: bool) -> "asyncio.Task[_Found | None]":
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(digest, is_token=is_token))
            self._lookups[digest] = lookup
            lookup.add_done_callback(lambda done: self._forget_lookup(digest, done))
        return lookup

    async def _look_up(self, digest: bytes, *, is_token: bool) -> _Found | None:
        asked_at = time.monotonic()
        row = await self._store.read(lambda connection: _select_credential(connection, digest, is_token=is_token))
        if row is None or not hmac.compare_digest(bytes(row.digest), digest):
            self._found.pop(digest, None)
            return None
        found = _Found(_to_user(row), row.expires_at_ms, asked_at + self._believe_seconds)
        if len(self._found) >= _CACHE_SIZE:
            self._found.clear()
        self._found[digest] = found
        if not _has_expired(found):
            self._note_use(row.secret_digest, row.last_used_at_ms)
        return found

    def _note_use(self, secret_digest: bytes, known_ms: int | None) -> None:
        minute_ms = _now_ms() // _MINUTE_MS * _MINUTE_MS
        if max(known_ms or 0, self._noted.get(secret_digest, 0)) >= minute_ms:
            return
        if len(self._noted) >= _CACHE_SIZE:
            self._noted.clear()
        self._noted[secret_digest] = minute_ms
        activity.note_key(secret_digest, minute_ms)

    def _forget_lookup(self, digest: bytes, lookup: "asyncio.Task[_Found | None]") -> None:
        del self._lookups[digest]
        if not lookup.cancelled():
            lookup.exception()  # it is raised where it is awaited; if everybody hung up, nobody is owed it

    async def _fail(self, address: str, challenge: Challenge = Challenge.UNKNOWN) -> NoReturn:
        await self._throttle.count_failed_sign_in(address)
        raise Rejected(Refusal.NOT_SIGNED_IN, challenge=challenge)


def digest_bearer(authorization: bytes) -> bytes | None:
    """Return the SHA-256 of the credential that an `authorization` header bears, which `recall` knows it by."""
    credential = _read_bearer(authorization)
    return hashlib.sha256(credential).digest() if credential is not None else None


def _read_bearer(authorization: bytes) -> bytes | None:
    scheme, _, credential = authorization.partition(b" ")
    credential = credential.strip()
    return credential if credential and scheme.lower() == b"bearer" else None


def _explain(authorization: bytes | None) -> Challenge:
    """Return what is wrong with a header that bears no credential."""
    if authorization is None:
        return Challenge.NO_HEADER
    if not authorization.strip():
        return Challenge.EMPTY
    return Challenge.MALFORMED if authorization.strip().lower() == b"bearer" else Challenge.OTHER_SCHEME


def _has_expired(found: _Found) -> bool:
    return found.expires_at_ms is not None and found.expires_at_ms <= _now_ms()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _digest(credential: str) -> bytes:
    return hashlib.sha256(credential.encode()).digest()


_USE = (api_secret.c.digest.label("secret_digest"), api_secret.c.last_used_at_ms)


def _select_credential(connection: Connection, digest: bytes, *, is_token: bool) -> Row[Any] | None:
    if is_token:
        statement = (
            select(api_user, access_token.c.digest, access_token.c.expires_at_ms, *_USE)
            .select_from(access_token.join(api_secret).join(api_user))
            .where(access_token.c.digest == digest)
        )
    else:
        statement = (
            select(api_user, api_secret.c.digest, literal(None).label("expires_at_ms"), *_USE)
            .select_from(api_secret.join(api_user))
            .where(api_secret.c.digest == digest)
        )
    return connection.execute(statement).one_or_none()


def _to_user(row: Row[Any], keys: Iterable[SecretKey] = ()) -> ApiUser:
    return ApiUser(
        api_key_id=row.api_key_id,
        name=row.name,
        grants=frozenset(Grant(grant) for grant in row.grants.split()),
        time_zone=row.time_zone,
        call_limit=row.call_limit,
        created_at_ms=row.created_at_ms,
        keys=tuple(keys),
    )


def add_user(
    connection: Connection,
    name: str,
    grants: Iterable[Grant],
    *,
    time_zone: str | None = None,
    call_limit: str | None = None,
) -> tuple[ApiUser, str]:
    """Make an API user with a first secret key; return both. The key is shown now or never.

    Raises `AdministrationError` for a name that is taken or empty, a time zone or a limit that is none.
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
            api_key_id=api_key_id, name=name, grants=_join(grants), created_at_ms=_now_ms(), **values
        )
    )
    secret_key = _insert_key(connection, api_key_id, _SLOTS[0])
    return find_user(connection, str(api_key_id)), secret_key


def match_expired_tokens() -> ColumnElement[bool]:
    """Return the condition of access tokens that expired so long ago that nobody has to recognise them."""
    return access_token.c.expires_at_ms < _now_ms() - _KEEP_EXPIRED_MS


def list_users(connection: Connection) -> list[ApiUser]:
    """Return every API user, by name."""
    keys: dict[UUID, list[SecretKey]] = {}
    for row in connection.execute(select(api_secret).order_by(api_secret.c.slot)):
        keys.setdefault(row.api_key_id, []).append(_to_key(row))
    return [
        _to_user(row, keys.get(row.api_key_id, ()))
        for row in connection.execute(select(api_user).order_by(api_user.c.name))
    ]


def find_user(connection: Connection, name_or_id: str) -> ApiUser:
    """Return the API user with that name or API key id; raises `AdministrationError` where there is none."""
    row = connection.execute(select(api_user).where(_matches(name_or_id))).one_or_none()
    if row is None:
        raise AdministrationError(f"There is no API user {name_or_id}.")
    keys = connection.execute(
        select(api_secret).where(api_secret.c.api_key_id == row.api_key_id).order_by(api_secret.c.slot)
    )
    return _to_user(row, map(_to_key, keys))


def _to_key(row: Row[Any]) -> SecretKey:
    return SecretKey(row.slot, row.created_at_ms, row.last_used_at_ms)


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
    """Make a secret key beside the one that is there; return its slot and the key, shown now or never.

    Raises `AdministrationError` where there are two.
    """
    free = [slot for slot in _SLOTS if slot not in user.key_slots]
    if not free:
        raise AdministrationError(f"{user.name} has two secret keys; delete one first.")
    return free[0], _insert_key(connection, user.api_key_id, free[0])


def delete_key(connection: Connection, user: ApiUser, slot: int) -> None:
    """Delete a secret key and the access tokens got with it; with key 1 gone, key 2 becomes key 1.

    Raises `AdministrationError` where there is no key in that slot.
    """
    if slot not in user.key_slots:
        raise AdministrationError(f"{user.name} has no secret key {slot}.")
    mine = api_secret.c.api_key_id == user.api_key_id
    connection.execute(delete(api_secret).where(mine, api_secret.c.slot == slot))
    connection.execute(update(api_secret).where(mine, api_secret.c.slot > slot).values(slot=slot))


def _insert_key(connection: Connection, api_key_id: UUID, slot: int) -> str:
    secret_key = _SECRET_PREFIX + secrets.token_urlsafe(32)
    connection.execute(
        insert(api_secret).values(digest=_digest(secret_key), api_key_id=api_key_id, slot=slot, created_at_ms=_now_ms())
    )
    return secret_key


def _join(grants: Iterable[Grant]) -> str:
    return " ".join(sorted(grants))
