"""What became of API users' calls a day at a time, how often updates came again, and when keys were used: in memory.

Whoever knows counts (`voicetx.recording.recorder` what became of updates, `voicetx.api` what was refused), for the
process as the metrics are, and `voicetx.services` keeps it every few seconds: a repeat costs no write of its own. A
process that is killed loses the last of these counts; what was recorded is counted exactly, with the updates
themselves.
"""

from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from voicetx.counting.tallies import Counts, Measure

DEPLOYMENT = ""
"""Under which the tallies keep these: no deployment has this id."""


class Activity(NamedTuple):
    """Counts: what API users' calls came to, and repeats by transaction id and digest of the update.

    Of secret keys, by their digest, the minute in which each was last used, in milliseconds since 1970.
    """

    users: Counts
    repeats: Counter[tuple[str, bytes]]
    keys: Counter[bytes]


_counted = Activity(Counter(), Counter(), Counter())


def count(api_key_id: UUID, what: str, times: int = 1) -> None:
    """Count something that an API user's calls came to, such as `repeated` or `code-1002`."""
    _counted.users[Measure.USER, f"{api_key_id.hex}.{what}.{datetime.now(UTC).date()}"] += times


def count_repeat(transaction_id: str, digest: bytes) -> None:
    """Count an update that was recorded before."""
    _counted.repeats[transaction_id, digest] += 1


def note_key(secret_digest: bytes, minute_ms: int) -> None:
    """Note the minute in which a secret key is being used."""
    _counted.keys[secret_digest] = max(minute_ms, _counted.keys[secret_digest])


def take() -> Activity:
    """Return what was counted since this was called last."""
    taken = Activity(Counter(_counted.users), Counter(_counted.repeats), Counter(_counted.keys))
    for counts in _counted:
        counts.clear()
    return taken


def give_back(counts: Activity) -> None:
    """Take back counts that could not be kept."""
    _counted.users.update(counts.users)
    _counted.repeats.update(counts.repeats)
    for secret_digest, minute_ms in counts.keys.items():
        note_key(secret_digest, minute_ms)
