"""Counts in memory: what became of API users' calls each day, how often updates were repeated, when keys were used.

`voicetx.recording.recorder` counts what became of updates and `voicetx.api` what was refused. Like the metrics, the
counts are the process's own; `voicetx.services` writes them to the database every few seconds, so a repeat costs no
write of its own. A process that is killed loses its latest counts. The recorded updates are counted exactly, together
with the updates themselves.
"""

from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from voicetx.counting.tallies import Counts, Measure

DEPLOYMENT = ""
"""The deployment id under which the tallies keep these counts; no deployment has it."""


class Activity(NamedTuple):
    """What was counted.

    `users` counts what became of API users' calls; `repeats` counts repeats by transaction id and digest of the update.
    `keys` has, by the digest of a secret key, the minute in which it was last used, in milliseconds since 1970.
    """

    users: Counts
    repeats: Counter[tuple[str, bytes]]
    keys: Counter[bytes]


_counted = Activity(Counter(), Counter(), Counter())


def count(api_key_id: UUID, what: str, times: int = 1) -> None:
    """Count what became of an API user's calls, such as `repeated` or `code-1002`."""
    _counted.users[Measure.USER, f"{api_key_id.hex}.{what}.{datetime.now(UTC).date()}"] += times


def count_repeat(transaction_id: str, digest: bytes) -> None:
    """Count an update that was recorded before."""
    _counted.repeats[transaction_id, digest] += 1


def note_key(secret_digest: bytes, minute_ms: int) -> None:
    """Note the minute in which a secret key is being used."""
    _counted.keys[secret_digest] = max(minute_ms, _counted.keys[secret_digest])


def take() -> Activity:
    """Return what was counted since the last call of this function."""
    taken = Activity(Counter(_counted.users), Counter(_counted.repeats), Counter(_counted.keys))
    for counts in _counted:
        counts.clear()
    return taken


def give_back(counts: Activity) -> None:
    """Take back counts that could not be written to the database."""
    _counted.users.update(counts.users)
    _counted.repeats.update(counts.repeats)
    for secret_digest, minute_ms in counts.keys.items():
        note_key(secret_digest, minute_ms)
