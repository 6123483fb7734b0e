"""What became of each API user's calls: updates recorded, repeated and stale, and refusals by code, a day at a time.

Counted in memory by whoever knows (`voicetx.recording` what became of updates, `voicetx.api` what was refused), for the
process as the metrics are, and kept with the tallies every few seconds by `voicetx.services`. A process that is killed
loses the last of these counts; what was recorded for a deployment is counted exactly, with the updates themselves.
"""

from collections import Counter
from datetime import UTC, datetime
from uuid import UUID

from voicetx.tallies import Counts, Measure

DEPLOYMENT = ""
"""Under which the tallies keep these: no deployment has this id."""

_counted: Counts = Counter()


def count(api_key_id: UUID, what: str, times: int = 1) -> None:
    """Count something that an API user's calls came to, such as `repeated` or `code-1002`."""
    _counted[Measure.USER, f"{api_key_id.hex}.{what}.{datetime.now(UTC).date()}"] += times


def take() -> Counts:
    """Return what was counted since this was called last."""
    taken = Counter(_counted)
    _counted.clear()
    return taken


def give_back(counts: Counts) -> None:
    """Take back counts that could not be kept."""
    _counted.update(counts)
