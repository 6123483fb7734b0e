"""A transaction's history as its page shows it: which updates are late, out of order or contradictory.

Pure. `voicetx.contract.merge` decides which update wins; this module only marks the newest update, and those that came
late, belong to an older attempt, came more than once or contradict themselves. Of a long history only the last part is
here; then nothing is marked that the earlier part could prove wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voicetx.contract.codes import contradicts
from voicetx.contract.fields import WIRE_NAMES
from voicetx.contract.update import Update, restore
from voicetx.dashboard.charts import Point
from voicetx.reading.transactions import HistoryEntry, TransactionReport


@dataclass(frozen=True, slots=True)
class Arrival:
    """An update in the order of arrival.

    `number` counts the arrivals from 1, and `place` is the update's place among them in the order of contract section
    5. `is_newest` means that it is the last in that order; `is_late`, that an update with a later place had arrived
    before it; `is_of_older_attempt`, that a later attempt was reported; `is_contradiction`, that its own call-state and
    drop-code contradict each other. `fields` are the fields it gave, by wire name.
    """

    number: int
    place: int
    entry: HistoryEntry
    fields: Mapping[str, str]
    is_newest: bool
    is_late: bool
    is_of_older_attempt: bool
    is_contradiction: bool

    @property
    def kind(self) -> str:
        """The CSS classes that mark the update."""
        marks = {
            "newest": self.is_newest,
            "late": self.is_late,
            "older": self.is_of_older_attempt,
            "contradiction": self.is_contradiction,
            "repeated": self.entry.repeats > 0,
        }
        return " ".join(mark for mark, is_set in marks.items() if is_set) or "plain"


def judge_history(report: TransactionReport, shown: TransactionReport) -> list[Arrival]:
    """Return a transaction's updates in the order of arrival, each with its marks.

    `shown` is the report as the user may see it: masked, or the same as `report`.
    """
    came = [_restore(entry, report.set_back) for entry in report.history]
    pairs = list(zip(came, shown.history, strict=True))
    # Nobody knows which of two came first within a millisecond, so we assume that they came in order.
    pairs.sort(key=lambda pair: (pair[1].received_at_ms, pair[0].position))
    places = {position: place for place, position in enumerate(sorted(update.position for update, _ in pairs), start=1)}
    # If the newest update is not among these, it came before them, so all of these are late.
    highest = 0 if any(update.digest == report.digest for update, _ in pairs) else len(pairs) + 1
    arrivals = []
    for number, (update, entry) in enumerate(pairs, start=report.updates - len(pairs) + 1):
        place = places[update.position]
        arrivals.append(
            Arrival(
                number=number,
                place=place,
                entry=entry,
                fields={WIRE_NAMES[name]: value for name, value in restore(entry.body).fields.items()},
                is_newest=update.digest == report.digest,
                is_late=place < highest,
                is_of_older_attempt=update.position.attempt < (report.attempt or 0),
                is_contradiction=contradicts(update.fields["call_state"], update.fields["drop_code"]),
            )
        )
        highest = max(highest, place)
    return arrivals


def _restore(entry: HistoryEntry, set_back: str | None) -> Update:
    """Return the update as it came, with its original digest: erasing a number later does not change its position."""
    update = restore(entry.body, set_back)
    return update._replace(position=update.position._replace(digest=entry.digest))


def plot_history(arrivals: Sequence[Arrival]) -> list[Point]:
    """Return the updates as points of a picture."""
    return [Point(arrival.place, arrival.kind) for arrival in arrivals]
