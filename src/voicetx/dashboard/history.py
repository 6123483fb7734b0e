"""A transaction's history as its page shows it: how each update stands to those that came before it.

Pure. Which update wins is decided by `voicetx.merge`; here that is only told: the newest one, those that came late, of
an older attempt, or say what cannot be. Repeats are not in a history: they are recognised and kept once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voicetx.contract import WIRE_NAMES, restore
from voicetx.dashboard.charts import Point
from voicetx.merge import contradicts
from voicetx.reports import HistoryEntry, TransactionReport


@dataclass(frozen=True, slots=True)
class Arrival:
    """An update in the order of arrival; `number` counts from 1, `place` is its place in the order of truth.

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
        }
        return " ".join(mark for mark, is_set in marks.items() if is_set) or "plain"


def judge_history(report: TransactionReport, shown: TransactionReport) -> list[Arrival]:
    """Return a transaction's updates in the order of arrival, each with how it stands to the others.

    `shown` is the report as who asks may see it: masked, or the same.
    """
    updates = [restore(entry.body) for entry in report.history]
    ranked = sorted(range(len(updates)), key=lambda number: updates[number].position)
    places = {number: place for place, number in enumerate(ranked, start=1)}
    last_attempt = max((update.position.attempt for update in updates), default=0)
    first_number = report.updates - len(updates)
    arrivals, highest = [], 0
    for number, (update, entry) in enumerate(zip(updates, shown.history, strict=True)):
        arrivals.append(
            Arrival(
                number=first_number + number + 1,
                place=places[number],
                entry=entry,
                fields={WIRE_NAMES[name]: value for name, value in restore(entry.body).fields.items()},
                is_newest=places[number] == len(updates),
                is_late=places[number] < highest,
                is_of_older_attempt=update.position.attempt < last_attempt,
                is_contradiction=contradicts(update.fields["call_state"], update.fields["drop_code"]),
            )
        )
        highest = max(highest, places[number])
    return arrivals


def plot_history(arrivals: Sequence[Arrival]) -> list[Point]:
    """Return the updates as points of a picture."""
    return [Point(arrival.place, arrival.kind) for arrival in arrivals]
