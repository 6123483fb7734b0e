"""Phone numbers, the ways in which people write them, and bodies that hold them anywhere."""

import json
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from bodies import make_body

numbers = st.from_regex(r"\A[1-9][0-9]{6,14}\Z")
connectors = st.sampled_from(["", "-", ".", "(", ")", "\u2011", "'", "\u2019", "\u00b7"])
separators = connectors | st.sampled_from([" ", ") ", "\u00a0"])


@st.composite
def writings_of(draw: st.DrawFn, number: str, separators: st.SearchStrategy[str] = separators) -> str:
    """Draw a way in which people and programs write a number."""
    text = "".join(digit + draw(separators) for digit in number[:-1]) + number[-1]
    return draw(
        st.sampled_from(["{}", "+{}", "sip:+{}@host", "tel:{};ext", "call {} now", "{}, please", "<sip:{}@h>"])
    ).format(text)


words = st.text(st.characters(exclude_categories=("Nd", "Cs"), exclude_characters="\0+")).map(
    lambda text: f"{text}\u00e9"
)


@st.composite
def bodies_about(draw: st.DrawFn, number: str, separators: st.SearchStrategy[str] = separators) -> str:
    """Draw the JSON of a body that holds a number in some of its fields, unknown ones, names and numbers among them."""
    written = writings_of(number, separators)
    leaves = st.one_of(words, st.none(), st.booleans(), st.just(int(number)), written)
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | written, inner, max_size=3),
        max_leaves=8,
    )
    known = {name: draw(written) for name in draw(st.sets(st.sampled_from(TEXT_FIELDS)))}
    body = make_body() | known | draw(st.dictionaries(words | written, values, max_size=4))
    text = json.dumps(body, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    if draw(st.booleans()):  # a digit may be written as an escape too
        text = text.replace(number, number[:-1] + f"\\u003{number[-1]}") if f'"{number}"' in text else text
    return text


TEXT_FIELDS = ["a-party", "b-party", "voice-tag", "message", "drop-reason"]


def texts_of(value: Any) -> Iterator[str]:
    """Yield every string, name and number in a JSON value."""
    match value:
        case dict():
            for name, inner in value.items():
                yield name
                yield from texts_of(inner)
        case list():
            for inner in value:
                yield from texts_of(inner)
        case bool() | None:
            return
        case _:
            yield str(value)


def digits_of(body: str) -> list[str]:
    """Return the digits of each text in a body, but for its times."""
    texts = (text for text in texts_of(json.loads(body)) if not re.fullmatch(r"2026-03-01 [0-9:.]+", text))
    return [re.sub(r"\D", "", text) for text in texts]
