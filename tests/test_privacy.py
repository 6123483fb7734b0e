"""What is hidden: of whatever body, no number and no digit that was pressed is left for who may not see them."""

import json
import re
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phone_numbers import bodies_about, connectors, digits_of, numbers, writings_of
from voicetx.contract import privacy
from voicetx.contract.fields import WIRE_NAMES, Privacy, UpdateBody


@given(data=st.data(), number=numbers)
def test_whatever_the_body_no_number_is_left(data: st.DataObject, number: str) -> None:
    """However a number is written and wherever it stands in a body, its masked form shows two digits of it at most."""
    masked = privacy.mask_body(data.draw(bodies_about(number)))
    assert all(len(digits) <= 4 for digits in digits_of(masked))  # the contract's codes have four
    assert not [digits for digits in digits_of(masked) if number in digits]


@given(data=st.data(), number=numbers)
def test_whatever_the_body_a_number_is_forgotten(data: st.DataObject, number: str) -> None:
    """However a number is written and wherever it stands in a body, nothing of it is left; again changes nothing."""
    body = data.draw(bodies_about(number))
    forgotten = privacy.forget_in_body(number, body)
    assert not [digits for digits in digits_of(forgotten) if number in digits]
    assert privacy.forget_in_body(number, forgotten) == forgotten


@given(data=st.data(), number=numbers, other=numbers)
def test_another_number_is_left_alone(data: st.DataObject, number: str, other: str) -> None:
    """A body about one number stays as it was when another is forgotten; a longer one is another."""
    if number == other:
        other += "0"
    body = data.draw(bodies_about(number, connectors))
    assert privacy.forget_in_body(other, body) == body
    longer = data.draw(
        st.sampled_from([f"+{number}1", f"1{number}", f"+49 {number}", f"id{number}7x", f"+1 {number} 2"])
    )
    assert privacy.forget_in_text(number, longer) == longer


@pytest.mark.parametrize(
    ("text", "forgotten"),
    [
        ("+1 555 0100", "+* *** ****"),
        ("15550100", "********"),
        ("(1) 555-0100", "(*) ***-****"),
        ("sip:+15550100@10.0.0.1", "sip:+********@10.0.0.1"),
        ("SIPS:15550100;user=phone@host", "SIPS:********;user=phone@host"),
        ("tel:+1-555-0100", "tel:+*-***-****"),
        ("1'555'0100", "*'***'****"),
        ("call 1\u2019555\u20190100", "call *\u2019***\u2019****"),
        ("1\u00b7555\u00b70100", "*\u00b7***\u00b7****"),
        ("rang '15550100'", "rang '********'"),
        ("49'1'555'0100", "49'1'555'0100"),
        ("15550100.0", "********.0"),
        ("\uff11\uff15\uff15\uff15\uff10\uff11\uff10\uff10", "********"),
        ("+15550100, +15550101", "+********, +15550101"),
        ("15550100/15550101", "********/15550101"),
        ("15550100 15550101", "******** 15550101"),
        ("rang 15550100 3 times", "rang ******** 3 times"),
        ("order 7 15550100", "order 7 ********"),
        ("15550100#", "********#"),
        ("155501001", "155501001"),
        ("2015550100", "2015550100"),
        ("+49 1 555 0100", "+49 1 555 0100"),
        ("49 1 555 0100", "49 1 555 0100"),
        ("rang +49 1 555 0100", "rang +49 1 555 0100"),
        ("+1 555 0100 22", "+1 555 0100 22"),
        ("15550100-15550101", "********-15550101"),
        ("rang +1 555 0100 3 times", "rang +* *** **** 3 times"),
        ("rang 1 555 0100-22", "rang 1 555 0100-22"),
        ("rang 49-1-555-0100", "rang 49-1-555-0100"),
        ("1:555:0100", "1:555:0100"),
    ],
)
def test_a_number_is_matched_by_its_digits(text: str, forgotten: str) -> None:
    """Spaces, signs, SIP and other scripts make no difference to a number, more digits make another one of it."""
    assert privacy.forget_in_text("15550100", text) == forgotten


def test_a_body_keeps_the_rest_to_the_letter() -> None:
    """Only the values that hold the number change: repeated names, spacing, escapes and huge numbers stay."""
    body = (
        '{ "transaction-id":"15550100","a-party" : "+15550100","a-party":"\\u0031 555 0100","x":[1e999,15550100,-0.0],'
        '"call-starttime":"2026-03-01 09:00:00.000","y":{"+15550100":"caf\\u00e9 \\/"} ,"b-party":"15550100\\n" }'
    )
    assert privacy.forget_in_body("15550100", body) == (
        '{ "transaction-id":"15550100","a-party" : "+********","a-party":"* *** ****","x":[1e999,"********",-0.0],'
        '"call-starttime":"2026-03-01 09:00:00.000","y":{"+********":"caf\\u00e9 \\/"} ,"b-party":"********\\n" }'
    )


def test_times_are_no_numbers() -> None:
    """The times of the contract are neither masked nor forgotten, though they are made of digits."""
    moment = "2026-03-01 09:00:00.000"
    assert privacy.mask_field("call-starttime", moment) == moment
    assert privacy.forget_in_text("20260301", moment) == moment


@pytest.mark.parametrize(
    ("name", "value", "masked"),
    [
        ("a-party", "+1 555 0100", "+* *** **00"),
        ("b-party", "sip:alice.15550100@voice.example", "sip:*****.******00@*****.*******"),
        ("a-party", "12345", "*****"),
        ("a-party", "2026-03-01 09:00:00.000", "****-**-** **:**:**.*00"),
        ("dtmf-digits", "1#3", "***"),
        ("message", "Busy, 3 tries, +1 555 0100", "Busy, 3 tries, +* *** **00"),
        ("message", "rang 555'123'4567", "rang ***'***'**67"),
        ("message", "rang 555\u2019123\u20194567", "rang ***\u2019***\u2019**67"),
        ("message", "rang 555\u00b7123\u00b74567", "rang ***\u00b7***\u00b7**67"),
        ("message", "'123', '456', '7'", "'123', '456', '7'"),
        ("drop-reason", "Q.850 cause 16", "Q.850 cause 16"),
        ("transaction-id", "15550100", "15550100"),
        ("drop-code", "2005", "2005"),
    ],
)
def test_what_is_shown_of_a_field(name: str, value: str, masked: str) -> None:
    """Of a number the last two digits are left, of digits pressed their count, of other texts all but numbers."""
    assert privacy.mask_field(name, value) == masked


def test_what_stands_below_a_personal_name_is_masked_at_any_depth() -> None:
    """A party or digits pressed in an unknown object are masked whole, however short, and by similar names too."""
    body = '{"transaction-id":"t","call":{"A_Party":{"user":"bob","n":[12,"34"]},"dtmf_digits":"12","retries":[12]}}'
    assert json.loads(privacy.mask_body(body)) == {
        "transaction-id": "t",
        "call": {"A_Party": {"user": "***", "n": ["**", "**"]}, "dtmf_digits": "**", "retries": [12]},
    }


@pytest.mark.parametrize("text", ["", "1234", "+", "one", "1" * 33, "15550100 and 15550101", "alice@host"])
def test_what_is_no_number_is_refused(text: str) -> None:
    """Too few digits, too many, or words are no number to forget."""
    with pytest.raises(ValueError, match="A number has 5 to 32 digits"):
        privacy.read_number(text)


@given(data=st.data(), number=numbers)
def test_a_number_is_read_as_people_write_it(data: st.DataObject, number: str) -> None:
    """Who names a number may write it in any way in which it may be found."""
    text = data.draw(writings_of(number).filter(lambda text: not re.search(r"[<,]|call", text)))
    assert privacy.read_number(text) == number


def test_a_field_says_what_it_is_to_privacy_or_there_is_no_contract() -> None:
    """A field that declares nothing of what it is to privacy, or two things, can't be defined."""
    with pytest.raises(TypeError, match=r"what are these to privacy\? caller_name, c_party"):

        class Body(UpdateBody):
            caller_name: str | None = None
            c_party: Annotated[str | None, Privacy.PARTY, Privacy.TEXT] = None
            reason: Annotated[str | None, Privacy.TEXT] = None


@pytest.mark.parametrize("name", WIRE_NAMES)
def test_what_may_be_personal_is_hidden_in_every_field(name: str) -> None:
    """Whatever field of the contract a number is in, but for the transaction's id, its masked form shows two digits."""
    masked = privacy.mask_field(WIRE_NAMES[name], "15550100")
    assert masked == {"transaction_id": "15550100", "dtmf_digits": "********"}.get(name, "******00")
