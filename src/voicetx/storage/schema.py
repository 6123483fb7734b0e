"""The tables: what is on disk, the same on SQLite and PostgreSQL.

`alembic/versions/` builds exactly this, and a test compares the two. Everything that one update touches has
`transaction_id` in its key, so that the two big tables can be sharded by it. Times that the service takes itself are
milliseconds since 1970 UTC; times from the wire are kept as they were sent. This module holds no statement.
"""

from collections.abc import Collection

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
)

from voicetx.contract.fields import WIRE_NAMES

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

# Ids are ASCII: compared byte by byte they sort as in Python, and faster than by a language's rules.
_ID = String(128).with_variant(String(128, collation="C"), "postgresql")

UNASSIGNED = "unassigned"
"""The deployment of transactions that nobody registered beforehand."""

FIELD_NAMES: tuple[str, ...] = tuple(name for name in WIRE_NAMES if name != "transaction_id")
"""The merged fields of a transaction, in the order of the contract: one column each."""

MERGED_NAMES: tuple[str, ...] = (*FIELD_NAMES, "set_back")
"""All columns that updates are merged into: these fields, and what is needed to read the times among them."""

api_user = Table(
    "api_user",
    metadata,
    Column("api_key_id", Uuid, primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("grants", Text, nullable=False, comment="separated by spaces, as an OAuth scope"),
    Column("time_zone", String(64), comment="IANA name; null: the setting VOICETX_TIMEZONE"),
    Column("call_limit", String(64), comment="such as 100/second; null: the setting VOICETX_THROTTLE"),
    Column("created_at_ms", BigInteger, nullable=False),
)

api_secret = Table(
    "api_secret",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True, comment="SHA-256 of the secret key"),
    Column("api_key_id", Uuid, ForeignKey("api_user.api_key_id", ondelete="CASCADE"), nullable=False),
    Column("slot", SmallInteger, nullable=False, comment="1 or 2"),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("last_used_at_ms", BigInteger, comment="by itself or by a token got with it, to the minute"),
    UniqueConstraint("api_key_id", "slot"),
)

access_token = Table(
    "access_token",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True, comment="SHA-256 of the access token"),
    Column(
        "secret_digest",
        LargeBinary(32),
        ForeignKey("api_secret.digest", ondelete="CASCADE"),
        nullable=False,
        index=True,
        comment="the secret key it was got with: revoked together",
    ),
    Column("expires_at_ms", BigInteger, nullable=False, index=True),
)

deployment = Table(
    "deployment",
    metadata,
    Column("deployment_id", _ID, primary_key=True),
    Column("name", String(256), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

voice_transaction = Table(
    "voice_transaction",
    metadata,
    Column("transaction_id", _ID, primary_key=True),
    Column("deployment_id", _ID, ForeignKey("deployment.deployment_id"), nullable=False),
    Column("registered_at_ms", BigInteger, comment="null: before schema 0004, when its deployment was made or later"),
    Column("updates", Integer, nullable=False, server_default="0", comment="different updates recorded"),
    Column("attempt", SmallInteger, comment="of the newest update, as all that follows"),
    Column("digest", LargeBinary(16)),
    *(Column(name, Text) for name in FIELD_NAMES),
    Column("set_back", Text, comment="where clocks were set back during the call: the last moment before, and seconds"),
    Column("older", Text, comment="JSON: which fields an older update of the attempt gave, and its place in the order"),
    Column("inconsistent", Boolean, nullable=False, server_default="0"),
    Column("finished", Boolean, nullable=False, server_default="0", comment="reported, and the call is over"),
    Column("updated_at_ms", BigInteger),
    Index("ix_voice_transaction_deployment_id", "deployment_id", "transaction_id"),
)
# The transactions whose outcome is missing; a row leaves this index once, when its call is over.
Index(
    "ix_voice_transaction_unfinished",
    voice_transaction.c.deployment_id,
    voice_transaction.c.transaction_id,
    sqlite_where=~voice_transaction.c.finished,
    postgresql_where=~voice_transaction.c.finished,
)

# No foreign keys: each row would cost a look-up, and a history outlives the API user that sent it.
voice_update = Table(
    "voice_update",
    metadata,
    Column("transaction_id", _ID, primary_key=True),
    Column("digest", LargeBinary(16), primary_key=True, comment="tells a repeat from another update"),
    Column("body", Text, nullable=False, comment="as received"),
    Column("received_at_ms", BigInteger, nullable=False),
    Column("api_key_id", Uuid, nullable=False),
    Column("repeats", Integer, nullable=False, server_default="0", comment="how often it came again; counted late"),
)

tally = Table(
    "tally",
    metadata,
    Column("deployment_id", _ID, primary_key=True, comment="empty: what API users did"),
    Column("measure", String(16), primary_key=True),
    Column("item", String(64), primary_key=True),
    Column("count", BigInteger, nullable=False),
)

# Recording only adds rows here, so no update ever waits for a counter.
tally_change = Table(
    "tally_change",
    metadata,
    # Identity, not a plain sequence: on that, a role that may write the tables would need one more right.
    Column("change_id", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("deployment_id", _ID, nullable=False),
    Column("registered", Integer, nullable=False, server_default="0"),
    Column("changes", Text, nullable=False),
)

audit_record = Table(
    "audit_record",
    metadata,
    Column("audit_record_id", Uuid, primary_key=True),
    Column("action", String(16), nullable=False, comment="purge or erase"),
    Column("operator", String(128), nullable=False, comment="the operating system's user who ran it"),
    Column("subject", Text, nullable=False, comment="JSON: what it was done to"),
    Column("counts", Text, nullable=False, comment="JSON: how much of what was done so far"),
    Column("started_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger, comment="null while it runs, and where it was stopped"),
)


def are_ours(table_names: Collection[str]) -> bool:
    """Say whether these are the tables of a voicetx database, at any schema; no other application has such names."""
    return voice_transaction.name in table_names or voice_update.name in table_names
