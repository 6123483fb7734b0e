"""Simulated calls: believable, the same for the same seed, and with as many mishaps as were asked for."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voicetx.cli.simulation import Campaign, Mishap, Sending, simulate
from voicetx.contract.codes import contradicts, is_final
from voicetx.contract.merge import fold
from voicetx.contract.refusals import Rejected
from voicetx.contract.update import Update, parse

PUNCTUAL = Campaign(seed=1, begins_at=datetime(2026, 3, 1, 9), speed=1, late=0, out_of_order=0, repeated=0)  # noqa: DTZ001 - as on the wire
SHARES = ("answered", "pressed", "transferred", "contradictory", "retried", "late", "out_of_order", "repeated")

campaigns = st.builds(
    Campaign,
    seed=st.integers(),
    begins_at=st.just(PUNCTUAL.begins_at),
    rate=st.floats(0.01, 1000),
    speed=st.floats(1, 1000),
    **{share: st.floats(0, 1) for share in SHARES},
)


def draw(campaign: Campaign, count: int = 1_000) -> list[Sending]:
    """Return what is sent in a campaign of so many calls."""
    return list(simulate(campaign, [f"tx-{number}" for number in range(count)]))


def collect(sendings: list[Sending]) -> dict[str, list[Update]]:
    """Return the different updates of each call, in their order."""
    calls: dict[str, dict[bytes, Update]] = defaultdict(dict)
    for _, update, _ in sendings:
        calls[update.transaction_id][update.digest] = update
    return {name: sorted(updates.values(), key=lambda update: update.position) for name, updates in calls.items()}


def count_seconds(update: Update) -> float:
    """Return how many seconds after the campaign began an update says that it is."""
    ended = datetime.strptime(update.position.call_endtime, "%Y-%m-%d %H:%M:%S.%f")  # noqa: DTZ007 - as on the wire
    return (ended - PUNCTUAL.begins_at).total_seconds()


def find_endings(sendings: list[Sending]) -> list[Update]:
    """Return the last update of each attempt."""
    attempts = {
        (name, update.position.attempt): update for name, updates in collect(sendings).items() for update in updates
    }
    return list(attempts.values())


@settings(max_examples=30)
@given(campaigns, st.integers(0, 30))
def test_the_same_seed_makes_the_same_calls(campaign: Campaign, count: int) -> None:
    """Campaigns of a seed send the same at the same times, a call for each id; those of another seed send others."""
    sendings = draw(campaign, count)
    assert draw(campaign, count) == sendings
    assert collect(sendings).keys() == {f"tx-{number}" for number in range(count)}
    if count:
        assert draw(replace(campaign, seed=campaign.seed + 1), count) != sendings


@settings(max_examples=30)
@given(campaigns)
def test_every_call_keeps_the_contract_and_is_over_once(campaign: Campaign) -> None:
    """Sendings come in order, never before what they tell of; attempts follow each other and each ends with one end."""
    sendings = draw(campaign, 20)
    assert all(before.at_seconds <= after.at_seconds for before, after in pairwise(sendings))
    for at_seconds, update, _ in sendings:
        assert parse(update.body.encode()) == update
        assert count_seconds(update) <= at_seconds + 0.001
        assert update.fields["a_party"] != update.fields["b_party"]
    for name, updates in collect(sendings).items():
        assert len({update.position.call_endtime for update in updates}) == len(updates)
        attempts = [update.position.attempt for update in updates]
        assert set(attempts) == set(range(1, attempts[-1] + 1))
        ends = [update for update in updates if is_final(update.fields["call_state"], update.fields["drop_code"])]
        assert [update.position.attempt for update in ends] == sorted(set(attempts))
        assert ends[-1] is updates[-1]
        assert fold(name, updates).is_finished


@settings(max_examples=20)
@given(campaigns)
def test_mishaps_change_when_and_never_what(campaign: Campaign) -> None:
    """Whatever goes wrong on purpose, the updates of the calls are the same, and nothing else is sent."""
    good = draw(replace(campaign, late=0, out_of_order=0, repeated=0), 20)
    assert {sending.mishap for sending in good} == {None}
    assert collect(draw(campaign, 20)) == collect(good)


@settings(max_examples=20)
@given(campaigns)
def test_mishaps_are_what_they_are_called(campaign: Campaign) -> None:
    """Late is by a minute at least, out of order after the next of the call, repeated once more; others are on time."""
    sendings = draw(replace(campaign, speed=1), 20)
    first_sent: dict[bytes, float] = {}
    for at_seconds, update, mishap in sendings:
        if mishap is Mishap.REPEATED:
            assert update.digest in first_sent
            continue
        assert update.digest not in first_sent
        first_sent[update.digest] = at_seconds
        delay = at_seconds - count_seconds(update)
        assert delay > 59.9 if mishap is Mishap.LATE else mishap is Mishap.OUT_OF_ORDER or delay < 0.01
    mishaps = {update.digest: mishap for _, update, mishap in sendings if mishap is not Mishap.REPEATED}
    for updates in collect(sendings).values():
        for update, following in pairwise(updates):
            if mishaps[update.digest] is Mishap.OUT_OF_ORDER:
                assert first_sent[update.digest] > first_sent[following.digest]
        assert mishaps[updates[-1].digest] is not Mishap.OUT_OF_ORDER


def share_of(is_so: Callable[[Update], bool], endings: list[Update]) -> float:
    """Return the share of attempts of which something is so."""
    return sum(map(is_so, endings)) / len(endings)


def is_answered(update: Update) -> bool:
    """Say whether an attempt was answered."""
    return update.fields["call_state"] in {"5", "6"}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_outcomes_come_in_the_shares_asked_for(share: float) -> None:
    """Of attempts so many are answered, and of answered ones so many have keys, a transfer or a contradiction."""
    endings = find_endings(draw(replace(PUNCTUAL, answered=share)))
    assert share_of(is_answered, endings) == pytest.approx(share, abs=0.05 * (0 < share < 1))
    wanted = {
        "pressed": lambda update: "dtmf_digits" in update.fields,
        "transferred": lambda update: update.fields["call_source"] == "3" and "trombone_endtime" in update.fields,
        "contradictory": lambda update: contradicts(update.fields["call_state"], update.fields["drop_code"]),
    }
    answered = find_endings(draw(replace(PUNCTUAL, answered=1, **dict.fromkeys(wanted, share))))
    for is_so in wanted.values():
        assert share_of(is_so, answered) == pytest.approx(share, abs=0.05 * (0 < share < 1))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_who_was_not_reached_is_called_again_as_often_as_asked(share: float) -> None:
    """Of busy lines and calls that nobody takes, so many are followed by another attempt; of other failures, none."""
    endings = find_endings(draw(replace(PUNCTUAL, answered=0, retried=share)))
    last = Counter(update.transaction_id for update in endings)
    unreached = [update for update in endings if update.position.attempt < 3]
    followed = [update for update in unreached if update.position.attempt < last[update.transaction_id]]
    busy = {"1002", "2000", "2002", "2003"}
    assert {update.fields["drop_code"] for update in followed} <= busy
    of_those = sum(update.fields["drop_code"] in busy for update in unreached)
    assert len(followed) / of_those == pytest.approx(share, abs=0.05 * (0 < share < 1))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_mishaps_come_in_the_shares_asked_for(share: float) -> None:
    """Of updates so many are late, or repeated, and of those that another follows so many out of order."""
    good = draw(PUNCTUAL)
    for name, mishap, possible in (
        ("late", Mishap.LATE, len(good)),
        ("repeated", Mishap.REPEATED, len(good)),
        ("out_of_order", Mishap.OUT_OF_ORDER, len(good) - 1_000),
    ):
        sendings = draw(replace(PUNCTUAL, **{name: share}))  # type: ignore[arg-type]
        found = sum(sending.mishap is mishap for sending in sendings)
        assert found / possible == pytest.approx(share, abs=0.05 * (0 < share < 1))


def test_calls_are_believable() -> None:
    """Calls begin at the rate; talk takes seconds to minutes; without contradictions no call contradicts itself."""
    sendings = draw(replace(PUNCTUAL, rate=50, contradictory=0))
    assert sum(sending.at_seconds < 10 and sending.update.fields["call_state"] == "2" for sending in sendings) >= 500
    begun = {sending.update.transaction_id for sending in sendings if sending.at_seconds < 10}
    assert begun == {f"tx-{number}" for number in range(500)}
    calls = collect(sendings)
    assert not any(fold(name, updates).is_inconsistent for name, updates in calls.items())
    talks = sorted(
        count_seconds(update)
        - count_seconds(update._replace(position=update.position._replace(call_endtime=update.position.call_starttime)))
        for update in find_endings(sendings)
        if is_answered(update)
    )
    assert 2 < talks[0] < 15 < talks[len(talks) // 2] < 60 < talks[-1] <= 900.1
    assert len({update.fields["drop_code"] for updates in calls.values() for update in updates}) > 10


def test_calls_pass_as_fast_as_asked_at_their_full_length() -> None:
    """Sixty times as fast, all is sent in a sixtieth of the time, and the same lengths are reported."""
    (slow, fast) = (draw(replace(PUNCTUAL, rate=1000, speed=speed), 1) for speed in (1, 60))
    assert fast[-1].at_seconds - fast[0].at_seconds == pytest.approx(
        (slow[-1].at_seconds - slow[0].at_seconds) / 60, abs=0.01
    )
    spans = [count_seconds(sent[-1].update) - count_seconds(sent[0].update) for sent in (slow, fast)]
    assert spans[0] > 1
    assert spans[0] == pytest.approx(spans[1], abs=0.01)


def test_an_id_that_is_none_is_refused() -> None:
    """Nothing is made of an id that the contract does not allow."""
    with pytest.raises(Rejected):
        list(simulate(PUNCTUAL, ["two words"]))
