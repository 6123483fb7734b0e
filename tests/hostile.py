"""Hostile input: bodies, lines and raw bytes that are meant to hurt, each drawn with the name of its kind."""

import json
from typing import Any

from hypothesis import strategies as st

from bodies import TROMBONE, make_body
from voicetx.api.bulk import BULK_PATH
from voicetx.api.tokens import TOKEN_PATH
from voicetx.contract.fields import WIRE_NAMES
from voicetx.contract.update import UPDATE_PATH

NUMBER, DIGITS = "+4915112345678", "9081*7265#"
"""A phone number and DTMF digits that are in most bodies: nothing that the service says may hold them."""

_WHOLE = make_body(
    a_party=NUMBER,
    b_party=NUMBER[::-1],
    dtmf_digits=DIGITS,
    message="hello",
    voice_tag="tag",
    drop_reason="normal",
    voice_recorded="Yes",
    times_attempted="1",
    **TROMBONE,
)

_ODD_TEXT = st.one_of(
    st.text(max_size=40),
    st.text(
        st.sampled_from("\x01\x1f\x7f\x80\u00a0\u200b\u202e\u2028\ufeff\ufffd\uffff\U0001f600\U0010ffff e\u0301"),
        max_size=20,
    ),
    st.sampled_from(
        ["\t", "\r\n", "'; drop table voice_update; --", "%s%n", "${x}", "{0}", "\\", '"', "../..", "<b>", "NaN"]
    ),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**400, 1e308, 5e-324, -0.0]),
    _ODD_TEXT,
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ODD_TEXT, inner, max_size=4), max_leaves=12
)
_NAMES = st.one_of(st.sampled_from([*WIRE_NAMES.values()]), _ODD_TEXT)


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a body made from a whole one."""
    kind = draw(st.sampled_from(_BODY_KINDS))
    if kind == "any bytes":
        return kind, draw(st.binary(max_size=300))
    if kind == "any JSON":
        return kind, json.dumps(draw(_VALUES)).encode()
    body: dict[str, Any] = dict(_WHOLE, **{"transaction-id": f"tx-{draw(st.integers(0, 9))}"})
    text = json.dumps(_change_fields(draw, kind, body), ensure_ascii=draw(st.booleans()))
    text = _change_text(draw, kind, text)
    return kind, _change_bytes(draw, kind, text.encode("utf-8", "surrogatepass"))


def _change_fields(draw: st.DrawFn, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    match kind:
        case "wrong type or value":
            return body | {draw(_NAMES): draw(_VALUES) for _ in range(draw(st.integers(1, 3)))}
        case "fields missing":
            gone = draw(st.lists(st.sampled_from([*body]), min_size=1, max_size=8))
            return {name: value for name, value in body.items() if name not in gone}
        case "long":
            return body | {draw(_NAMES): draw(st.sampled_from("a \u00e9\U0001f600")) * draw(st.integers(1000, 12_000))}
        case "many fields":
            return body | {f"{draw(_ODD_TEXT)}{number}": number for number in range(draw(st.integers(100, 1000)))}
    return body


def _change_text(draw: st.DrawFn, kind: str, text: str) -> str:
    match kind:
        case "deep":
            depth = draw(st.sampled_from([1, 100, 126, 127, 128, 199, 200, 201, 255, 256, 1000, 10_000]))
            opening, closing = draw(st.sampled_from([("[", "]"), ('{"x":', "}")]))
            return f'{text[:-1]},"deep":{opening * depth}1{closing * depth * draw(st.booleans())}}}'
        case "escapes":
            escape = draw(st.sampled_from(_ESCAPES))
            name = draw(st.sampled_from([*WIRE_NAMES.values(), "unknown", escape]))
            return f'{text[:-1]},"{name}":"a{escape}b"}}'
        case "numbers":
            name = draw(st.sampled_from(["unknown", "times-attempted"]))
            return f'{text[:-1]},"{name}":{draw(st.sampled_from(_NUMBERS))}}}'
        case "names repeated":
            again = ",".join(
                f"{json.dumps(draw(_NAMES))}:{json.dumps(draw(_VALUES))}" for _ in range(draw(st.integers(1, 6)))
            )
            return f"{{{again},{text[1:-1]},{again}}}"
    return text


def _change_bytes(draw: st.DrawFn, kind: str, content: bytes) -> bytes:
    match kind:
        case "cut off":
            return content[: draw(st.integers(0, len(content) - 1))]
        case "bytes changed":
            return _damage(draw, content)
        case "bytes put in":
            place = draw(st.integers(0, len(content)))
            return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
        case "other encodings":
            encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "utf-7"]))
            return content.decode("utf-8", "replace").encode(encoding)
        case "too large":
            return content.ljust(draw(st.sampled_from([65_536, 65_537, 200_000])))
    return content


def _damage(draw: st.DrawFn, content: bytes, within: int = 2000) -> bytes:
    """Change some bytes, most of them near the start."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        damaged[draw(st.integers(0, min(len(damaged), within) - 1))] = draw(st.integers(0, 255))
    return bytes(damaged)


_ESCAPES = ["\\u0000", "\\ud800", "\\udc00\\ud800", "\\ud83d\\ude00", "\\x", "\\u12", "\\uFFFF", "\\/"]
_NUMBERS = [
    *("1" * 5000, "-" + "9" * 60_000, "0" * 9, "0." + "3" * 9999, "1e400", "-1e-400", "1e" + "9" * 50),
    *("NaN", "Infinity", "-Infinity", "0x10", "1_000", "+1", ".5", "1.", "\u0661"),
]
_BODY_KINDS = (
    "wrong type or value",
    "fields missing",
    "long",
    "many fields",
    "deep",
    "escapes",
    "numbers",
    "names repeated",
    "cut off",
    "bytes changed",
    "bytes put in",
    "other encodings",
    "too large",
    "any bytes",
    "any JSON",
)

hostile_bodies: st.SearchStrategy[tuple[str, bytes]] = _bodies()

_HEADERS = st.one_of(
    st.sampled_from(
        [
            b"connection: close",
            b"connection: upgrade\r\nupgrade: h2c",
            b"upgrade: websocket\r\nconnection: keep-alive, Upgrade",
            b"expect: 100-continue",
            b"content-type: text/plain",
            b"content-length: 10",
            b"content-length: -1",
            b"transfer-encoding: chunked",
            b"transfer-encoding: gzip, chunked",
            b"trailer: x",
            b"te: trailers",
            b"host: [::",
            b"host:",
            b"x-request-id: a b",
            b"x-forwarded-for: unknown, 999.1.1.1, [::1]:x",
            b"range: bytes=9-1,x",
            b"if-modified-since: never",
            b"authorization: Basic Og==",
            b"authorization: Bearer vsk_guess",
            b" folded",
            b"no colon",
            b": no name",
        ]
    ),
    st.tuples(st.text("abc-_!\x00\xe9 ", min_size=1, max_size=9), st.binary(max_size=20)).map(
        lambda pair: pair[0].encode("latin-1") + b": " + pair[1]
    ),
    st.integers(1, 300).map(lambda number: b"\r\n".join([b"x: y"] * number)),
    st.integers(1, 40_000).map(lambda size: b"x: " + b"y" * size),
)
_TARGETS = st.one_of(
    st.sampled_from(
        [
            *(UPDATE_PATH, UPDATE_PATH, UPDATE_PATH, BULK_PATH, TOKEN_PATH),
            *("/healthz", "/readyz", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json"),
            *("/static-offline-docs/favicon.png", "/static-offline-docs/..%2f..%2f__init__.py"),
            *("/static-offline-docs/%00", "/static-offline-docs/" + "x" * 300, "/static-offline-docs"),
            *(
                "*",
                "http://x" + UPDATE_PATH,
                "//",
                "/%",
                UPDATE_PATH + "?" + "a=b&" * 500,
                TOKEN_PATH + "?grant_type=%ff",
            ),
        ]
    ),
    st.text(max_size=20).map(lambda text: "/" + text),
)
_METHODS = st.sampled_from(
    ["PUT", "POST", "PATCH", "GET", "HEAD", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PURGE", "MADEUP", "put", ""]
)


@st.composite
def hostile_streams(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """Draw what comes over one connection, in pieces; `KEY` in it is to be replaced by a secret key."""
    kind = draw(st.sampled_from(["requests", "odd heads", "odd framing", "bytes changed", "any bytes"]))
    requests = [draw(_requests(kind)) for _ in range(draw(st.integers(1, 5)))]
    stream = draw(st.binary(min_size=1, max_size=200)) if kind == "any bytes" else b"".join(requests)
    if kind == "bytes changed":
        stream = _damage(draw, stream)
    cuts = sorted({draw(st.integers(0, len(stream))) for _ in range(draw(st.integers(0, 4)))})
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return kind, [piece for piece in pieces if piece]


@st.composite
def _requests(draw: st.DrawFn, kind: str) -> bytes:
    _, body = draw(hostile_bodies)
    is_odd = kind == "odd heads"
    method, target = (draw(_METHODS), draw(_TARGETS)) if is_odd else ("PUT", UPDATE_PATH)
    headers = [b"host: x", b"authorization: Bearer KEY", *(draw(st.lists(_HEADERS, max_size=3)) if is_odd else [])]
    framing = draw(st.sampled_from(["length", "chunks"]))
    if kind == "odd framing":
        framing = draw(st.sampled_from(["wrong length", "wrong chunks", "none"]))
    match framing:
        case "length":
            headers.append(b"content-length: %d" % len(body))
        case "wrong length":
            headers.append(b"content-length: %d" % draw(st.integers(0, 2 * len(body))))
        case "chunks" | "wrong chunks":
            headers.append(b"transfer-encoding: chunked")
            cut = draw(st.integers(0, len(body)))
            parts = [part for part in (body[:cut], body[cut:]) if part]
            off = draw(st.sampled_from([-1, 1])) if framing == "wrong chunks" else 0
            body = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part) + off, part) for part in parts)
            body += draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nx-trailer: y\r\n\r\n"]))
    version = draw(st.sampled_from(["1.1", "1.1", "1.0"]))
    return b"\r\n".join([f"{method} {target} HTTP/{version}".encode("utf-8", "replace"), *headers, b"", b""]) + body
