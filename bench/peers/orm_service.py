"""The update endpoint as most people would write it: FastAPI, SQLAlchemy's ORM, a session and a commit a request.

It does less than voicetx: no throttle, no metrics, no log line, no merge of late updates beyond "newest wins", and it
checks fewer rules. The credential's look-up is remembered for two seconds, the pool is sized, statements are prepared.
"""

import hashlib
import os
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import BigInteger, LargeBinary, Uuid, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://"), pool_size=20, max_overflow=0
)
make_session = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


class Model(DeclarativeBase):
    """The tables that voicetx has, in the ORM's words."""


class ApiSecret(Model):
    """A secret key's digest."""

    __tablename__ = "api_secret"
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    api_key_id: Mapped[UUID] = mapped_column(Uuid)


class VoiceTransaction(Model):
    """A transaction and what is known of it."""

    __tablename__ = "voice_transaction"
    transaction_id: Mapped[str] = mapped_column(primary_key=True)
    updates: Mapped[int]
    attempt: Mapped[int | None]
    digest: Mapped[bytes | None] = mapped_column(LargeBinary(16))
    call_starttime: Mapped[str | None]
    call_endtime: Mapped[str | None]
    call_source: Mapped[str | None]
    call_state: Mapped[str | None]
    drop_code: Mapped[str | None]
    dtmf_digits: Mapped[str | None]
    message: Mapped[str | None]
    times_attempted: Mapped[str | None]
    a_party: Mapped[str | None]
    b_party: Mapped[str | None]
    updated_at_ms: Mapped[int | None] = mapped_column(BigInteger)


class VoiceUpdate(Model):
    """One update, as received."""

    __tablename__ = "voice_update"
    transaction_id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(16), primary_key=True)
    body: Mapped[str]
    received_at_ms: Mapped[int] = mapped_column(BigInteger)
    api_key_id: Mapped[UUID] = mapped_column(Uuid)


_MOMENT = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}$"


class Update(BaseModel):
    """The body of an update."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    transaction_id: str = Field(min_length=1, max_length=128)
    call_starttime: str = Field(pattern=_MOMENT)
    call_endtime: str = Field(pattern=_MOMENT)
    call_source: str = Field(pattern="^[123]$")
    call_state: str = Field(pattern="^[1-6]$")
    drop_code: str = Field(pattern=r"^\d{4}$")
    dtmf_digits: str | None = Field(None, pattern=r"^[0-9*#A-D]{1,64}$")
    message: str | None = Field(None, max_length=1024)
    times_attempted: str | None = Field(None, pattern=r"^\d{1,4}$")
    a_party: str | None = Field(None, max_length=32)
    b_party: str | None = Field(None, max_length=32)


async def open_session() -> AsyncIterator[AsyncSession]:
    """Give a request its session."""
    async with make_session() as session:
        yield session


_found: dict[bytes, tuple[float, UUID]] = {}


async def find_user(
    authorization: Annotated[str, Header()], session: Annotated[AsyncSession, Depends(open_session)]
) -> UUID:
    """Return who the credential belongs to."""
    digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
    known = _found.get(digest)
    if known is not None and known[0] > time.monotonic():
        return known[1]
    user = await session.scalar(select(ApiSecret.api_key_id).where(ApiSecret.digest == digest))
    if user is None:
        raise HTTPException(401)
    _found[digest] = time.monotonic() + 2, user
    return user


@app.put("/campaignapi/resources/v3/voicecampaigntransactions")
async def update(
    body: Update,
    user: Annotated[UUID, Depends(find_user)],
    session: Annotated[AsyncSession, Depends(open_session)],
) -> dict[str, Any]:
    """Record an update."""
    text = body.model_dump_json(by_alias=True, exclude_none=True)
    digest = hashlib.sha256(text.encode()).digest()[:16]
    now_ms = int(time.time() * 1000)
    transaction = await session.get(VoiceTransaction, body.transaction_id, with_for_update=True)
    if transaction is None:
        raise HTTPException(400)
    session.add(
        VoiceUpdate(
            transaction_id=body.transaction_id, digest=digest, body=text, received_at_ms=now_ms, api_key_id=user
        )
    )
    transaction.updates += 1
    attempt = int(body.times_attempted or 0)
    if (attempt, body.call_endtime) >= (transaction.attempt or 0, transaction.call_endtime or ""):
        transaction.attempt, transaction.digest, transaction.updated_at_ms = attempt, digest, now_ms
        for name, value in body.model_dump(exclude={"transaction_id"}, exclude_none=True).items():
            setattr(transaction, name, value)
    try:
        await session.commit()
    except IntegrityError:
        await session.rollback()  # a repeat
    return {"transaction-id": body.transaction_id}
