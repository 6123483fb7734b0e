"""Who a credential belongs to: secret keys, access tokens, and the sessions of the dashboard.

This is the second step of handling an update, after the path and method: `Authenticator.recall` or `authenticate` turns
an `authorization` header into an `ApiUser`. Of credentials, only the SHA-256 digests are kept in memory. How users and
keys are made: `voicetx.access.users`. Source: docs/contract.md, section 4.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, literal, select

from voicetx.access.users import SECRET_PREFIX, ApiUser, digest_credential, to_user
from voicetx.contract.refusals import Challenge, Refusal, Rejected
from voicetx.counting import activity
from voicetx.settings import Settings
from voicetx.storage.schema import access_token, api_secret, api_user
from voicetx.storage.store import Store, ValueRefused

if TYPE_CHECKING:
    from voicetx.access.throttle import Throttle  # the command line does not need it, and starts faster without it

TOKEN_PREFIX = "vat_"  # noqa: S105 - the same for access tokens
_CREDENTIAL = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # b64token of RFC 6750, section 2.1
_CACHE_SIZE = 10_000
_MINUTE_MS = 60_000
_KEEP_EXPIRED_MS = 86_400_000  # an expired token is answered as expired for a day, not counted as a guess


@dataclass(frozen=True, slots=True)
class Token:
    """An access token, which is shown only once; `expires_in_seconds` counts from when it was made."""

    access_token: str
    expires_in_seconds: int
    user: ApiUser


@dataclass(frozen=True, slots=True)
class _Found:
    """What the database says about a credential, and until when that may be used (monotonic seconds)."""

    user: ApiUser
    expires_at_ms: int | None
    believed_until: float


class Authenticator:
    """Tells who a credential belongs to, and caches the database's answer for `credential_cache_seconds`.

    So a revocation takes effect in every process within that time. A credential that is used in the last quarter of it
    is looked up again in the background, so that dialers that send all the time do not wait for the database.

    When a credential is looked up, the use of its secret key is noted with the process's activity, at most once a
    minute, and only if the database does not know of that minute already. Using a token counts as using its key.

    Failed sign-ins are counted by client address and refused past a limit. A credential that is known to be valid is
    exempt, so one misconfigured dialer does not lock out others behind the same address.
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
        """Return the user of a credential if the cache knows it at this moment, or None; never waits."""
        found = self._find_believed(credential_digest)
        return found.user if found is not None and not _has_expired(found) else None

    async def authenticate(self, authorization: bytes | None, address: str) -> ApiUser:
        """Return the API user whose secret key or access token is in the `authorization` header.

        Raises `Rejected` (498), `ThrottleReached` for an address with too many failed sign-ins, `StoreUnavailable`.
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

        It counts as a call of that user. Raises `Rejected` (498) if the two do not belong together, and otherwise what
        `authenticate` raises.
        """
        user = await self._find_by_key(secret_key, address)
        if not hmac.compare_digest(str(user.api_key_id).encode(), api_key_id.strip().lower().encode()):
            await self._fail(address)
        return await self._issue(user, secret_key, self._token_lifetime_seconds, address)

    async def open_session(self, secret_key: str, address: str) -> Token:
        """Make an access token for a browser to keep, given only a secret key; otherwise like `issue_token`."""
        user = await self._find_by_key(secret_key, address)
        return await self._issue(user, secret_key, self._session_lifetime_seconds, address)

    async def close_session(self, token: str) -> None:
        """Delete an access token; other processes accept it for at most `credential_cache_seconds` more.

        Raises `StoreUnavailable`.
        """
        digest = digest_credential(token)

        def work(connection: Connection) -> None:
            connection.execute(delete(access_token).where(access_token.c.digest == digest))

        await self._store.write(work)
        if (lookup := self._lookups.get(digest)) is not None:
            await asyncio.wait([lookup])  # it may have read the token before it was deleted
        self._found.pop(digest, None)

    async def _find_by_key(self, secret_key: str, address: str) -> ApiUser:
        if not secret_key.startswith(SECRET_PREFIX):
            await self._fail(address)
        return (await self._find(secret_key.encode(), address)).user

    async def _issue(self, user: ApiUser, secret_key: str, lifetime_seconds: int, address: str) -> Token:
        if (admission := self._throttle.admit(user.api_key_id, user.call_limit)) is not None:
            await admission
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now_ms = _now_ms()
        secret_digest = digest_credential(secret_key)

        def work(connection: Connection) -> None:
            connection.execute(delete(access_token).where(match_expired_tokens()))
            connection.execute(
                insert(access_token).values(
                    digest=digest_credential(token),
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
        # Shielded, because callers share it: one that hangs up must not cancel it for the others.
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
        found = _Found(to_user(row), row.expires_at_ms, asked_at + self._believe_seconds)
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
            lookup.exception()  # callers that await it get it raised; if all have hung up, asyncio must not log it

    async def _fail(self, address: str, challenge: Challenge = Challenge.UNKNOWN) -> NoReturn:
        await self._throttle.count_failed_sign_in(address)
        raise Rejected(Refusal.NOT_SIGNED_IN, challenge=challenge)


def digest_bearer(authorization: bytes) -> bytes | None:
    """Return the SHA-256 of the credential in an `authorization` header, as `recall` needs it, or None without one."""
    credential = _read_bearer(authorization)
    return hashlib.sha256(credential).digest() if credential is not None else None


def _read_bearer(authorization: bytes) -> bytes | None:
    scheme, _, credential = authorization.partition(b" ")
    credential = credential.strip()
    return credential if credential and scheme.lower() == b"bearer" else None


def _explain(authorization: bytes | None) -> Challenge:
    """Return what is wrong with a header that has no credential in it."""
    if authorization is None:
        return Challenge.NO_HEADER
    if not authorization.strip():
        return Challenge.EMPTY
    return Challenge.MALFORMED if authorization.strip().lower() == b"bearer" else Challenge.OTHER_SCHEME


def _has_expired(found: _Found) -> bool:
    return found.expires_at_ms is not None and found.expires_at_ms <= _now_ms()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


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


def match_expired_tokens() -> ColumnElement[bool]:
    """Return the condition for access tokens that expired more than a day ago, and may be deleted."""
    return access_token.c.expires_at_ms < _now_ms() - _KEEP_EXPIRED_MS
