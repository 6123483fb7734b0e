"""The merge law: any permutation of the same updates, with any repeats, ends in the same transaction."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import TROMBONE, encode, make_body, updates_of
from voicetx.contract.codes import contradicts
from voicetx.contract.merge import Transaction, apply, fold
from voicetx.contract.update import Update, parse


def merge_in_order(updates: Sequence[Update]) -> Transaction:
    """Merge as the service does: one update after the other, repeats dropped."""
    transaction = Transaction("tx-1")
    known = set()
    for update in updates:
        if update.digest not in known:
            known.add(update.digest)
            transaction = apply(transaction, update)
    return transaction


def parse_body(**fields: object) -> Update:
    """Return the update that a body with these fields makes."""
    return parse(encode(make_body(**fields)))


@given(st.data())
def test_any_order_and_repeats_end_the_same(data: st.DataObject) -> None:
    """Whatever the order and however often, the same updates make the same transaction."""
    bodies = data.draw(st.lists(updates_of(), min_size=1, max_size=7))
    updates = [parse(encode(body)) for body in bodies]
    shuffled = data.draw(st.permutations(updates + data.draw(st.lists(st.sampled_from(updates), max_size=4))))
    distinct = {update.digest: update for update in updates}
    assert merge_in_order(shuffled) == fold("tx-1", distinct.values())


@given(st.lists(updates_of(), min_size=1, max_size=7))
def test_fold_is_the_overlay_of_the_newest_attempt(bodies: list[dict[str, str]]) -> None:
    """Each field shows the value that the last update of the newest attempt to give it gave."""
    distinct = {update.digest: update for update in (parse(encode(body)) for body in bodies)}
    newest_attempt = max(update.position.attempt for update in distinct.values())
    expected: dict[str, str] = {}
    for update in sorted(distinct.values(), key=lambda update: update.position):
        if update.position.attempt == newest_attempt:
            expected.update(update.fields)
    transaction = fold("tx-1", distinct.values())
    assert transaction.fields == expected
    assert transaction.updates == len(distinct)


def test_later_update_wins_field_by_field() -> None:
    """A later update replaces what it gives and leaves what it does not give."""
    first = parse_body(message="ringing", voice_tag="tag", call_state="3", drop_code="2020")
    second = parse_body(message="done", call_endtime="2026-03-01 09:02:00.000")
    shown = merge_in_order([first, second]).fields
    assert (shown["message"], shown["voice_tag"], shown["call_state"]) == ("done", "tag", "5")


def test_late_update_fills_in_what_nobody_gave() -> None:
    """An update that comes late still gives the fields that no newer one gave."""
    late = parse_body(message="ringing", voice_tag="tag", call_endtime="2026-03-01 09:00:30.000")
    newest = parse_body(message="done")
    shown = merge_in_order([newest, late]).fields
    assert (shown["message"], shown["voice_tag"]) == ("done", "tag")


def test_late_update_between_two_others_is_folded_in_its_place() -> None:
    """A late update overrides an older one's field though a newer one, silent on it, was seen first."""
    oldest = parse_body(message="old", call_endtime="2026-03-01 09:00:10.000")
    middle = parse_body(message="middle", call_endtime="2026-03-01 09:00:20.000")
    newest = parse_body()
    assert merge_in_order([oldest, newest, middle]).fields["message"] == "middle"


@pytest.mark.parametrize("older_first", [True, False])
def test_older_attempt_never_touches_the_transaction(older_first: bool) -> None:
    """Nothing of an older attempt is shown, not even a field that the newest attempt does not give."""
    older = parse_body(times_attempted="1", message="first try", call_endtime="2026-03-01 10:00:00.000")
    newer = parse_body(times_attempted="2")
    transaction = merge_in_order([older, newer] if older_first else [newer, older])
    assert "message" not in transaction.fields
    assert transaction.fields["times_attempted"] == "2"
    assert transaction.updates == 2


def test_trombone_times_stay_off_a_call_that_was_not_transferred() -> None:
    """Trombone times with another call-source are kept in the history only."""
    update = parse_body(**{**TROMBONE, "call_source": "2"})
    assert not {"trombone_starttime", "trombone_endtime"} & merge_in_order([update]).fields.keys()


@pytest.mark.parametrize(
    ("call_state", "drop_code", "expected"),
    [
        ("5", "1002", True),
        ("5", "2002", True),
        ("6", "2001", True),
        ("2", "2005", True),
        ("1", "2005", True),
        ("5", "2005", False),
        ("5", "2004", False),
        ("5", "2006", False),
        ("5", "2020", False),
        ("6", "2005", False),
        ("3", "2002", False),
        ("2", "1002", False),
        ("3", "2004", False),
        ("1", "2020", False),
    ],
)
def test_contradictions(call_state: str, drop_code: str, expected: bool) -> None:
    """A call is inconsistent where it can't have got as far as its state and ended with its code."""
    assert contradicts(call_state, drop_code) is expected
    assert merge_in_order([parse_body(call_state=call_state, drop_code=drop_code)]).is_inconsistent is expected
