"""The rows of a batch: which columns are read and written, in which order, and the types that hold them.

`voicetx.recording.batch` converts between updates and these rows; `voicetx.storage.sqlite` and
`voicetx.storage.postgresql` read and write them. Knows neither SQL nor which update wins.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from voicetx.storage.schema import MERGED_NAMES

SEEN_NAMES = ("transaction_id", "deployment_id", "updates", "attempt", "digest", "older")
"""The columns of a transaction that are read before its merged fields."""

WRITTEN_NAMES = ("updates", "attempt", "digest", "older", *MERGED_NAMES, "inconsistent", "finished")
"""The columns of a transaction that an update changes, besides the time of the change."""

HISTORY_NAMES = ("transaction_id", "digest", "body", "received_at_ms", "api_key_id")
"""The columns of an update in the history."""


class SeenRow(NamedTuple):
    """A registered transaction as it is in the database, and which of the updates asked about are in its history.

    `fields` has the merged fields in the order of `MERGED_NAMES`; a field not given is None. If the history is short,
    `held` may have digests that nobody asked about.
    """

    transaction_id: str
    deployment_id: str
    updates: int
    attempt: int | None
    digest: bytes | None
    older: str | None
    fields: Sequence[str | None]
    held: set[bytes]


class ChangedRow(NamedTuple):
    """A transaction to be written back: its deployment when it was read, and values by name.

    The values are those of `WRITTEN_NAMES`, the `transaction_id`, what was read before (the count of its updates as
    `seen`, its digits pressed as `digits_seen`), and its line for the tallies as `change`.
    """

    deployment_id: str
    values: Mapping[str, Any]
