"""A transaction's history as its page shows it: how each update stands to those that came before it.

Pure. Which update wins is decided by `voicetx.contract.merge`; here that is only told: the newest one, those that came
late, of an older attempt, more than once, or say what cannot be. Of a long history only the last part is there: then
nothing is told that the part before could belie.
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
    """An update in the order of arrival; `number` counts from 1, `place` is its place among these in that of truth.

    `is_newest` says that it is the last in that order, `is_late` that one which comes after it there was here before
    it, `is_of_older_attempt` that a later attempt was reported, `is_contradiction` that its own call-state and
    drop-code cannot both be. `fields` are those it gave, by wire name.
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
        """The classes that mark it."""
        marks = {
            "newest": self.is_newest,
            "late": self.is_late,
            "older": self.is_of_older_attempt,
            "contradiction": self.is_contradiction,
            "repeated": self.entry.repeats > 0,
        }
        return " ".join(mark for mark, is_set in marks.items() if is_set) or "plain"


def judge_history(report: TransactionReport, shown: TransactionReport) -> list[Arrival]:
    """Return a transaction's updates in the order of arrival, each with how it stands to the others.

    `shown` is the report as who asks may see it: masked, or the same.
    """
    came = [_restore(entry, report.set_back) for entry in report.history]
    pairs = list(zip(came, shown.history, strict=True))
    # Which of two came first within a millisecond nobody knows: they are taken to have come as they should.
    pairs.sort(key=lambda pair: (pair[1].received_at_ms, pair[0].position))
    places = {position: place for place, position in enumerate(sorted(update.position for update, _ in pairs), start=1)}
    # Where the newest is not among these it came before them, so they all are late.
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
    """Return the update that an entry was when it came: a number that was erased since changes nothing in its place."""
    update = restore(entry.body, set_back)
    return update._replace(position=update.position._replace(digest=entry.digest))


def plot_history(arrivals: Sequence[Arrival]) -> list[Point]:
    """Return the updates as points of a picture."""
    return [Point(arrival.place, arrival.kind) for arrival in arrivals]
