"""What is personal in an update, and how it is hidden: phone numbers, and the digits that a person pressed.

Pure functions on texts and bodies, used to show them (`voicetx.reading`) and to erase a number
(`voicetx.campaigns.erase`). How personal a field of the contract is, `voicetx.contract.fields` declares. Everything
else in a body stays exactly as it came, including repeated names, spacing and numbers too large for any parser. That is
why a body is changed token by token, and not parsed and written again. Source: docs/decisions/0013-what-is-hidden.md.
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
_FEWEST_DIGITS = 7  # so many digits are taken for a phone number in any text
_FEWEST_TO_FORGET = 5  # shorter ones are codes: the contract's own have four digits
_MOST_TO_FORGET = 32
_MOST_OF_A_NUMBER = 15  # ITU-T E.164

# Brackets, dots and dashes; apostrophes (used in Switzerland); middle dots (used in Japan); invisible characters.
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
"""Takes the name of a field (empty for a text that is not a field's value) and a text; returns the text to show."""


def mask_field(name: str, value: str) -> str:
    """Return the value of a field, given by its wire name, with asterisks in place of what is personal.

    The last two digits of a number stay. Every other letter and digit of a party is hidden, and so is every digit that
    was pressed. In other texts, anything that looks like a number is hidden: seven or more digits, however separated.
    """
    match _PRIVACY.get(name):
        case Privacy.PARTY:
            return _mask_party(value)
        case Privacy.KEYS:
            return "*" * len(value)
        case Privacy.IDENTITY:
            return value
        case _:
            # Codes and times are masked too: if a body gives a field twice, the first value was never checked.
            return value if _MOMENT.fullmatch(value) else _LOOKS_LIKE_A_NUMBER.sub(_mask_number, value)


def mask_body(body: str) -> str:
    """Return a body, still JSON, with everything personal hidden, at any depth and in names too."""
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
    """Return the text with the digits of the number hidden wherever it stands, however its digits are separated.

    Where the digits are part of a longer number, that is another number, and it stays.
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
    """Return the body with the number hidden at any depth and in names too, except in the transaction's own id."""
    if "\\" not in body and not _may_hold(digits, body):
        return body

    def forget(name: str, text: str) -> str:
        return text if _PRIVACY.get(name) is Privacy.IDENTITY else forget_in_text(digits, text)

    return _rewrite(body, forget)


def digest_number(digits: str) -> str:
    """Return 16 bits of a number's SHA-256: enough to recognise a known number, too few to find an unknown one.

    Source: decision 14.
    """
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
    """Say quickly whether a text may hold the number, so that most texts need no closer look."""
    return digits in text.translate(_SQUEEZED) or not text.isascii()


def _find(digits: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield where the number stands in a text."""
    # This keeps the length of the text, so a number stands at the same place in both.
    plain = text if text.isascii() else "".join(str(unicodedata.decimal(character, character)) for character in text)
    one = _read_digits(plain)
    # More digits than one number can have are several numbers. Spreadsheets write a number as a fraction, such as 5.0.
    is_another = one is not None and one != digits and len(one) <= _MOST_OF_A_NUMBER and plain != f"{digits}.0"
    if is_another:
        return
    for found in _compile(digits).finditer(plain):
        if not _is_part(digits, plain, *found.span()) or plain == f"{digits}.0":
            yield found.span()


def _is_part(digits: str, text: str, start: int, end: int) -> bool:
    """Say whether the digits from `start` to `end` belong to a longer number.

    A plus sign begins a number; dashes, dots, apostrophes and brackets connect its parts. A space may connect parts or
    separate numbers. It is taken to separate them, because hiding too little is worse than hiding too much.
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
    """Return JSON with each string, number and name replaced by what `change` returns, and the rest exactly as it was.

    Values nested anywhere in a party or in pressed digits are treated as that field; nested in any other field, they
    are treated as no field's.
    """
    around: list[str] = []  # the field that each open object or array belongs to
    pending: str | None = None  # the field whose name was just read and whose value comes next

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
