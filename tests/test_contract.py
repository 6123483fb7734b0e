"""The wire: what a body may hold, and which answer each way of breaking a rule gets."""

import gzip
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF32_BE
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import BAD_VALUES, GONE, GOOD_VALUES, NOT_JSON, TROMBONE, encode, make_body
from voicetx.contract.fields import WIRE_NAMES
from voicetx.contract.refusals import Fault, Refusal, Rejected
from voicetx.contract.update import parse, restore

MANDATORY = ["transaction-id", "call-starttime", "call-endtime", "call-source", "call-state", "drop-code"]


def refuse(body: bytes) -> tuple[int, list[str]]:
    """Return the code and the fields at fault that a body is refused with."""
    with pytest.raises(Rejected) as refused:
        parse(body)
    return refused.value.refusal.code, [fault.field for fault in refused.value.faults]


def test_users_example_is_accepted() -> None:
    """The request example of the user's document, its gaps filled in, makes an update of all its fields."""
    example = {
        "transaction-id": "tx-1",
        "call-starttime": "2014-08-26 08:00:58.211",
        "call-endtime": "2014-08-26 08:00:59.200",
        "call-source": "3",
        "trombone-starttime": "2014-08-26 08:00:58.211",
        "trombone-endtime": "2014-08-26 08:00:59.211",
        "dtmf-digits": "1",
        "voice-tag": "tag",
        "call-state": "6",
        "drop-code": "2005",
        "drop-reason": "Normal clearing",
        "message": "Call finished",
        "voice-recorded": "Yes",
        "times-attempted": "1",
        "a-party": "919999999999",
        "b-party": "918888888888",
    }
    update = parse(encode(example))
    assert {"transaction-id": update.transaction_id} | {
        WIRE_NAMES[name]: value for name, value in update.fields.items()
    } == example


@pytest.mark.parametrize(("field", "value"), GOOD_VALUES)
def test_good_values_are_accepted(field: str, value: str) -> None:
    """A value at the edge of its field's rule is accepted and kept as it is."""
    update = parse(encode(make_body() | {field: value}))
    assert ({"transaction_id": update.transaction_id} | dict(update.fields))[field.replace("-", "_")] == value


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_values_are_named(field: str, value: Any) -> None:
    """A value that breaks its field's rule is refused with 499 and its field, and the reason never quotes it."""
    body = encode(make_body() | {field: value})
    assert refuse(body) == (499, [field])
    with pytest.raises(Rejected) as refused:
        parse(body)
    assert len(str(value)) < 5 or str(value) not in refused.value.faults[0].reason


@pytest.mark.parametrize("field", ["trombone-starttime", "trombone-endtime"])
@pytest.mark.parametrize("value", ["2026-02-30 09:00:00.000", "soon"])
def test_trombone_times_follow_the_rules_of_times(field: str, value: str) -> None:
    """With call-source 3 a trombone time that is no real time is refused with 499."""
    assert refuse(encode(make_body(**TROMBONE) | {field: value})) == (499, [field])


def test_trombone_must_not_end_before_its_start() -> None:
    """A trombone that ends before it starts is refused, one that takes no time at all is not."""
    body = make_body(**TROMBONE)
    start = body["trombone-starttime"]
    assert parse(encode(body | {"trombone-endtime": start})).fields["trombone_endtime"] == start
    assert refuse(encode(body | {"trombone-endtime": "2026-03-01 09:00:29.999"})) == (499, ["trombone-endtime"])


@pytest.mark.parametrize("source", ["1", "2"])
@pytest.mark.parametrize("value", ["soon", "", None, "2026-03-01 09:00:30.000"])
def test_trombone_times_are_not_applicable_otherwise(source: str, value: str | None) -> None:
    """With another call-source trombone times are accepted whatever they say, and are not put on the transaction."""
    update = parse(encode(make_body(call_source=source, trombone_starttime=value, trombone_endtime=value)))
    assert not {"trombone_starttime", "trombone_endtime"} & update.fields.keys()


@pytest.mark.parametrize("field", MANDATORY)
@pytest.mark.parametrize("value", [GONE, None, "", "  \t\n"])
def test_missing_mandatory_fields_are_named(field: str, value: object) -> None:
    """A mandatory field that is absent, null or empty after trimming is missing."""
    assert refuse(encode(make_body(**{field.replace("-", "_"): value}))) == (1002, [field])


@pytest.mark.parametrize("field", ["trombone-starttime", "trombone-endtime"])
@pytest.mark.parametrize("value", [GONE, None, " "])
def test_missing_trombone_times_are_named(field: str, value: object) -> None:
    """With call-source 3 a trombone time that is not given is missing."""
    assert refuse(encode(make_body(**{**TROMBONE, field.replace("-", "_"): value}))) == (1002, [field])


def test_every_missing_field_is_named_before_any_bad_value() -> None:
    """What is missing is answered first, all of it, trombone times included, whatever else is wrong."""
    assert refuse(b"{}") == (1002, MANDATORY)
    assert refuse(encode({"call-source": " 3 ", "call-state": "9", "message": "x" * 2000})) == (
        1002,
        [
            "transaction-id",
            "call-starttime",
            "call-endtime",
            "trombone-starttime",
            "trombone-endtime",
            "drop-code",
        ],
    )


def test_faults_come_in_body_order() -> None:
    """The fields at fault are named in the order in which the body gives them, each once."""
    body = {"b-party": "1" * 65, "zzz": "\0", "message": "\0" * 2000} | make_body(call_state="9", drop_code="1")
    assert refuse(encode(body)) == (499, ["b-party", "zzz", "message", "call-state", "drop-code"])


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:24]))
def test_what_is_not_json_is_refused(body: bytes) -> None:
    """What RFC 8259 does not call JSON, or is no object, is invalid input JSON."""
    assert refuse(body)[0] == 1001


REASONS = [
    (b"", "must not be empty"),
    (b" \r\n", "must not be empty"),
    (BOM_UTF8, "must not be empty"),
    (b"[]", "must be an object, not an array"),
    (b'"4711"', "must be an object, not a string"),
    (b"4711", "must be an object, not a number"),
    (b"true", "must be an object, not true or false"),
    (b"null", "must be an object, not null"),
    (b'{"a": "4711\xff"}', "must be UTF-8: byte 12 is not"),
    (BOM_UTF8 + b'{"a": "4711\xff"}', "must be UTF-8: byte 12 is not"),
    ('{"a": "4711"}'.encode("utf-16"), "must be UTF-8, not UTF-16"),
    (BOM_UTF16_BE + '{"a": "4711"}'.encode("utf-16-be"), "must be UTF-8, not UTF-16"),
    ('{"a": "4711"}'.encode("utf-32"), "must be UTF-8, not UTF-32"),
    (BOM_UTF32_BE + '{"a": "4711"}'.encode("utf-32-be"), "must be UTF-8, not UTF-32"),
    (gzip.compress(b'{"a": "4711"}', mtime=0), "must not be compressed"),
    (b'{"a": "4711",}', "must be JSON: trailing comma at line 1, column 14"),
    (b'{\n"a": "4711"\n"b": 1}', "must be JSON: no comma or brace after a value at line 3, column 1"),
    (b'{"a": "4711"', "must be JSON: cut off within an object at line 1, column 12"),
    (b"{'4711': 1}", "must be JSON: a name that is not in double quotes at line 1, column 2"),
    (b'{"4711": 1} 4711', "must be JSON: text after its end at line 1, column 13"),
    (b'{"a": "47\\11"}', "must be JSON: an unknown escape at line 1, column 11"),
    (b'{"a": "\\ud800-4711"}', "must be JSON: a lone surrogate at line 1, column 14"),
    (b'{"a": "4711\n"}', "must be JSON: a control character in a string at line 1, column 12"),
    (b'{\n"a": "\n', "must be JSON: a control character in a string at line 2, column 7"),
    (b'{"a": "\t4711"}', "must be JSON: a control character in a string at line 1, column 8"),
    (b'{"a": "4711"\n', "must be JSON: cut off within an object at line 1, column 13"),
    (b'{"a": NaN}', "must be JSON: no value at line 1, column 7"),
    (b'{"a":' + b"[" * 300, "must be JSON: nested too deeply at line 1, column 206"),
]


@pytest.mark.parametrize(("body", "reason"), REASONS, ids=[repr(body[:24]) for body, _ in REASONS])
def test_what_is_not_json_is_told_why(body: bytes, reason: str) -> None:
    """1001 says of the body as a whole what is wrong with it, and where, and never quotes it."""
    with pytest.raises(Rejected) as refused:
        parse(body)
    assert refused.value.refusal is Refusal.INVALID_JSON
    assert refused.value.faults == (Fault("", reason),)


@given(st.binary(max_size=60) | st.text('{}[]:,"\\ue1-+.tfn\n').map(str.encode))
def test_every_reason_is_one_of_ours(body: bytes) -> None:
    """Whatever is no JSON object, the reason is in words of ours alone."""
    with pytest.raises(Rejected) as refused:
        parse(body)
    reasons = [fault.reason for fault in refused.value.faults if fault.field == ""]
    ours = r"must (be|not) [A-Za-z ,-]+(8|16|32)?(: [a-z ,]+ at line [1-9]\d*, column [1-9]\d*|: byte \d+ is not)?"
    assert all(re.fullmatch(ours, reason) for reason in reasons)
    assert refused.value.refusal is Refusal.FIELD_MISSING or reasons


def test_a_byte_order_mark_is_ignored() -> None:
    """A UTF-8 byte order mark at the start of a body is no part of it (RFC 8259, section 8.1)."""
    plain = parse(encode(make_body()))
    assert parse(BOM_UTF8 + encode(make_body())) == plain
    assert restore(plain.body) == plain


@pytest.mark.parametrize("field", [*WIRE_NAMES.values()])
@pytest.mark.parametrize("value", [1, 1.5, True, [], {}, ["2"]])
def test_values_of_another_type_are_refused(field: str, value: Any) -> None:
    """Anything but a string in a field of the contract is invalid input JSON, before anything is missing."""
    assert refuse(encode({field: value})) == (1001, [field])


def test_of_a_repeated_name_the_last_counts() -> None:
    """A name that stands twice has the value that stands last, for good and for bad."""
    body = encode(make_body())[:-1]
    assert parse(body + b', "message": 1, "message": "last"}').fields["message"] == "last"
    assert refuse(body + b', "call-state": "9"}') == (499, ["call-state"])


def test_values_are_trimmed_before_any_rule() -> None:
    """White space around a value is no part of it."""
    padded = {name: f" \t{value}\n\u00a0" for name, value in make_body(message="m " * 512).items()}
    update = parse(encode(padded))
    assert update.transaction_id == "tx-1"
    assert update.fields["message"] == ("m " * 512).strip()
    assert update.digest == parse(encode(make_body(message="m " * 512))).digest


def test_a_backslash_before_u0000_is_not_nul() -> None:
    """The text backslash-u-0000 is four harmless digits after two harmless characters."""
    assert parse(encode(make_body(message=r"\u0000"))).fields["message"] == r"\u0000"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_digest_depends_on_fields_and_values_only(unknown: dict[str, Any], random: Any) -> None:
    """Order and spacing of the body do not change the digest, and what is read back from the history is the same."""
    body = {name: value for name, value in unknown.items() if name not in WIRE_NAMES.values()} | make_body()
    items = list(body.items())
    random.shuffle(items)
    first = parse(encode(body))
    second = parse(json.dumps(dict(items), indent=3, ensure_ascii=False).encode())
    assert first.digest == second.digest
    assert restore(first.body) == first


def test_digest_tells_every_value_apart() -> None:
    """Another value, a further unknown field, a number that differs past a double's precision: another update."""
    bodies = [
        encode(make_body()),
        encode(make_body(message="x")),
        encode(make_body(x="1")),
        encode(make_body(x=1)),
        encode(make_body(x=True)),
        *(
            encode(make_body())[:-1] + b', "x": %b}' % x
            for x in [b"1e400", b"1e401", b"0.1", b"0.10000000000000000001"]
        ),
        encode(make_body())[:-1] + b', "x": %b}' % (b"9" * 30),
        encode(make_body())[:-1] + b', "x": %b}' % (b"9" * 29 + b"8"),
    ]
    assert len({parse(body).digest for body in bodies}) == len(bodies)


def test_a_field_that_is_not_given_makes_no_difference() -> None:
    """Absent, null and empty are the same update."""
    digests = {parse(encode(make_body(message=value, x=value))).digest for value in [GONE, None, "", "  "]}
    assert len(digests) == 1


def test_table_of_refusals_is_the_contracts() -> None:
    """Each code stands with its HTTP status and its description, verbatim, as in docs/contract.md."""
    table = {(refusal.status, refusal.code): refusal.description for refusal in Refusal}
    assert table[401, 498] == "Invalid token or Access token expired"
    assert table[401, 430] == "Authorization failed. This resource is not allowed to access using this TOKEN or KEY"
    assert table[200, 1010] == "The request was not processed."
    assert table[405, 405] == "Method not supported"
    assert table[429, 429] == "Too many requests. Throttle limit reached for the time window."
    assert table[499, 499] == (
        "Request failed. Check the exact reason of failure in application code and description of error stream."
    )
    assert table[500, 500] == "Internal server error"
    assert table[500, 1001] == "Invalid input JSON"
    assert table[500, 1002] == "Mandatory field missing"
