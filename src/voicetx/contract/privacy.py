"""What is personal in an update, and how it is hidden: numbers and the digits that a person pressed.

Pure functions on texts and bodies, for whoever shows them (`voicetx.reading`) and for whoever has to forget a
number (`voicetx.campaigns.erase`). What a field of the contract is to privacy, `voicetx.contract.fields` declares.
A body keeps all the rest to the letter, so it is read token by token and never parsed and written anew: names given
twice, spacing and numbers that no parser can hold stay as they came. Knows neither HTTP nor the database. Source:
docs/decisions/0013-what-is-hidden.md.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache

from voicetx.contract.fields import PRIVACY, WIRE_NAMES, Privacy

_PRIVACY = {WIRE_NAMES[name]: privacy for name, privacy in PRIVACY.items()}
_PERSONAL = frozenset(name for name, privacy in _PRIVACY.items() if privacy in {Privacy.PARTY, Privacy.KEYS})

_SHOWN_DIGITS = 2
_FEWEST_DIGITS = 7  # of what is taken for a number wherever it stands
_FEWEST_TO_FORGET = 5  # shorter ones are codes: the contract's own have four digits
_MOST_TO_FORGET = 32
_MOST_OF_A_NUMBER = 15  # ITU-T E.164

# Brackets, dots, dashes; apostrophes, as in Switzerland; middle dots, as in Japan; what nobody sees.
_CONNECTORS = (
    r"().\-_\u2010-\u2015\u2212"
    r"'\u02bc\u2018\u2019\u2032\uff07"
    r"\u00b7\u2022\u2027\u2219\u22c5\u30fb\uff65"
    r"\u00ad\u200b-\u200f\u2060\ufeff"
)
_SEPARATOR = rf"[\s/{_CONNECTORS}]"
_LOOKS_LIKE_A_NUMBER = re.compile(rf"\d(?:{_SEPARATOR}*\d){{{_FEWEST_DIGITS - 1},}}")
_MOMENT = re.compile(r"\s*\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\s*", re.ASCII)
_SCHEME = re.compile(r"\s*(?:sips?|tel):", re.IGNORECASE)
# A slash may also stand between two numbers, so it is not among these.
_ONE_NUMBER = re.compile(rf"[\s+(]*[0-9][0-9\s{_CONNECTORS}]*")
_ADDRESS_END = re.compile(r"[@;]")
_BEGUN_BEFORE = re.compile(rf"\+(?:{_SEPARATOR}|[0-9])*[0-9](?:{_SEPARATOR})*$")
_CONNECTED_BEFORE = re.compile(rf"(?:[0-9][{_CONNECTORS}]*)*$")
_CONNECTED_AFTER = re.compile(rf"(?:[{_CONNECTORS}]*[0-9])*")
_NEARBY = 64
_SQUEEZED = str.maketrans("", "", " \t\n\r\v\f\x1c\x1d\x1e\x1f().-/_'")
_TOKEN = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]|[^\s{}\[\],:"]+', re.DOTALL)

Change = Callable[[str, str], str]
"""From the name of a field (empty for what is no field's value) and a text to what is shown in its place."""


def mask_field(name: str, value: str) -> str:
    """Return a field's value, by its wire name, with what is personal in it hidden behind asterisks.

    Of a number the last two digits are left; of a party every letter and digit else is hidden, and every digit that was
    pressed. In other texts whatever looks like a number is hidden: seven digits or more, however they are set.
    """
    match _PRIVACY.get(name):
        case Privacy.PARTY:
            return _mask_party(value)
        case Privacy.KEYS:
            return "*" * len(value)
        case Privacy.IDENTITY:
            return value
        case _:
            # Codes and times too: a body may give a field twice, and the first of the two is held to no rule.
            return value if _MOMENT.fullmatch(value) else _LOOKS_LIKE_A_NUMBER.sub(_mask_number, value)


def mask_body(body: str) -> str:
    """Return a body with what is personal in it hidden, at any depth and in names too; still JSON."""
    return _rewrite(body, mask_field)


def read_number(text: str) -> str:
    """Return the digits of a phone number as people write it, or of a SIP address.

    Raises ValueError with a sentence for a text that is neither.
    """
    digits = _read_digits(text)
    if digits is None or not _FEWEST_TO_FORGET <= len(digits) <= _MOST_TO_FORGET:
        raise ValueError(f"A number has {_FEWEST_TO_FORGET} to {_MOST_TO_FORGET} digits, such as +1 555 0100.")
    return digits


def forget_in_text(digits: str, text: str) -> str:
    """Return the text with every digit of the number hidden, wherever it holds the number, however that is set.

    A number that is part of a longer one is another number.
    """
    if not _may_hold(digits, text) or _MOMENT.fullmatch(text):
        return text
    parts: list[str] = []
    shown = 0
    for start, end in _find(digits, text):
        parts += text[shown:start], _hide_digits(text[start:end])
        shown = end
    return "".join([*parts, text[shown:]])


def forget_in_body(digits: str, body: str) -> str:
    """Return the body with the number hidden at any depth, in names too, but for the transaction's own id."""
    if "\\" not in body and not _may_hold(digits, body):
        return body

    def forget(name: str, text: str) -> str:
        return text if _PRIVACY.get(name) is Privacy.IDENTITY else forget_in_text(digits, text)

    return _rewrite(body, forget)


def digest_number(digits: str) -> str:
    """Return 16 bits of a number's SHA-256: who knows the number finds it again, who does not can't (decision 14)."""
    return hashlib.sha256(digits.encode()).hexdigest()[:4]


def _mask_party(value: str) -> str:
    scheme = _SCHEME.match(value)
    start = scheme.end() if scheme is not None else 0
    user = value[start:].split("@", 1)[0]
    digits = [place for place, character in enumerate(user, start) if character.isdecimal()]
    shown = digits[-_SHOWN_DIGITS:] if len(digits) >= _FEWEST_DIGITS else []
    return value[:start] + "".join(
        "*" if character.isalnum() and place not in shown else character
        for place, character in enumerate(value[start:], start)
    )


def _mask_number(found: re.Match[str]) -> str:
    text = found[0]
    last = [place for place, character in enumerate(text) if character.isdecimal()][-_SHOWN_DIGITS]
    return _hide_digits(text[:last]) + text[last:]


def _hide_digits(text: str) -> str:
    return re.sub(r"\d", "*", text)


def _read_digits(text: str) -> str | None:
    """Return the digits of a text that is one number and nothing else, or None."""
    scheme = _SCHEME.match(text)
    user = _ADDRESS_END.split(text[scheme.end() if scheme is not None else 0 :], maxsplit=1)[0]
    return re.sub(r"[^0-9]", "", user) if _ONE_NUMBER.fullmatch(user) else None


def _may_hold(digits: str, text: str) -> bool:
    """Say, fast, whether a text is worth a closer look."""
    return digits in text.translate(_SQUEEZED) or not text.isascii()


def _find(digits: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield where the number stands in a text."""
    # Of the same length: what is found is where it was.
    plain = text if text.isascii() else "".join(str(unicodedata.decimal(character, character)) for character in text)
    one = _read_digits(plain)
    # More digits than a number has are several numbers; a table's program writes a number as a fraction.
    is_another = one is not None and one != digits and len(one) <= _MOST_OF_A_NUMBER and plain != f"{digits}.0"
    if is_another:
        return
    for found in _compile(digits).finditer(plain):
        if not _is_part(digits, plain, *found.span()) or plain == f"{digits}.0":
            yield found.span()


def _is_part(digits: str, text: str, start: int, end: int) -> bool:
    """Say whether what stands from `start` to `end` belongs to a longer number.

    A plus sign begins a number; dashes, dots, apostrophes and brackets connect its parts. A space may or may not: then
    it is taken for the end, since too little hidden is worse than too much.
    """
    if _BEGUN_BEFORE.search(text, max(0, start - _NEARBY), start):
        return True
    before = _CONNECTED_BEFORE.search(text, max(0, start - _NEARBY), start)
    after = _CONNECTED_AFTER.match(text, end, end + _NEARBY)
    more = sum(character.isdecimal() for found in (before, after) if found is not None for character in found[0])
    return 0 < more <= _MOST_OF_A_NUMBER - len(digits)


@lru_cache(maxsize=8)
def _compile(digits: str) -> re.Pattern[str]:
    return re.compile("(?<![0-9])" + f"{_SEPARATOR}*".join(digits) + "(?![0-9])")


def _rewrite(body: str, change: Change) -> str:
    """Return JSON with each string, number and name as `change` makes it, and all else as it was to the letter.

    What stands anywhere below a party's name or that of digits pressed goes by it, below any other name by none.
    """
    around: list[str] = []  # the field that each open object or array belongs to
    pending: str | None = None  # the name that was read last, and whose value comes next

    def replace(token: re.Match[str]) -> str:
        nonlocal pending
        text = token[0]
        if text in ("}", "]"):
            around.pop()
            return text
        if token[2] is not None:
            name = json.loads(token[1])
            field = name.strip().lower().replace("_", "-")
            pending = around[-1] or (field if field in _PERSONAL else name if len(around) == 1 else "")
            return _dump(token[1], name, change("", name)) + token[2]
        field = pending if pending is not None else around[-1] if around else ""
        pending = None
        if text in ("{", "["):
            around.append(field if field in _PERSONAL else "")
            return text
        if token[1] is not None:
            value = json.loads(text)
            return _dump(text, value, change(field, value))
        if text in ("true", "false", "null"):
            return text
        return _dump(text, text, change(field, text))

    return _TOKEN.sub(replace, body)


def _dump(token: str, before: str, after: str) -> str:
    return token if before == after else json.dumps(after, ensure_ascii=False)
