"""Pictures in SVG, as text: pure functions from numbers to markup.

Everything that a picture shows is also there in words or figures beside it. So for screen readers, a picture is hidden,
or has a label that says the same in a sentence. The style sheet gives each class its colour, for light and dark. A
picture is stretched to the width of its place, so it has no text in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

_HEIGHT = 100
_STEP = 10  # from one bar to the next
_GAP = 2
_ORDER_STEP = 40
_ORDER_ROW = 16


class Part(NamedTuple):
    """A part of a whole: how much of it, and the class that colours it."""

    number: int
    kind: str


class Point(NamedTuple):
    """An update by its place in the order of section 5; lower ones are older. `kind` is the class that marks it."""

    place: int
    kind: str


def draw_bar(share: float, kind: str = "accent") -> Markup:
    """Return a bar whose length is a share of one. It is hidden from screen readers, since the number is beside it."""
    width = f"{max(0.0, min(1.0, share)) * 100:.2f}"
    return Markup(  # noqa: S704 - of numbers and our own words
        f'<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<rect class="track" width="100" height="1"/><rect class="{kind}" width="{width}" height="1"/></svg>'
    )


def draw_parts(parts: Sequence[Part], label_id: str) -> Markup:
    """Return one bar made of the parts of a whole; the element with the id `label_id` says what it shows."""
    whole = sum(part.number for part in parts) or 1
    rects, start = [], 0.0
    for part in parts:
        width = part.number / whole * 100
        if part.number:
            rects.append(f'<rect class="{part.kind}" x="{start:.2f}" width="{max(width - 0.3, 0.3):.2f}" height="1"/>')
        start += width
    return Markup(  # noqa: S704 - of numbers and our own words
        f'<svg class="parts" viewBox="0 0 100 1" preserveAspectRatio="none" role="img" aria-labelledby="{label_id}">'
        f'<rect class="track" width="100" height="1"/>{"".join(rects)}</svg>'
    )


def draw_columns(numbers: Sequence[int], label_id: str) -> Markup:
    """Return a column for each number, the largest as high as the picture."""
    top = max(numbers, default=0) or 1
    columns = "".join(
        f"M{place * _STEP + _GAP / 2:g} {_HEIGHT}V{_HEIGHT - max(1.5, number / top * _HEIGHT):.4g}"
        f"h{_STEP - _GAP}V{_HEIGHT}z"
        for place, number in enumerate(numbers)
        if number
    )
    width = len(numbers) * _STEP
    return Markup(  # noqa: S704 - of numbers and our own words
        f'<svg class="columns" viewBox="0 0 {width} {_HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-labelledby="{label_id}"><path class="grid" d="M0 .5H{width}M0 50H{width}M0 99.5H{width}"/>'
        f'<path class="accent" d="{columns}"/></svg>'
    )


def draw_order(points: Sequence[Point], label_id: str) -> Markup:
    """Return updates from left to right as they came, each as high as its place in the order of section 5.

    An update that came in order is higher than all before it; a late one is lower than one before it.
    """
    width, height = len(points) * _ORDER_STEP, (len(points) + 1) * _ORDER_ROW
    spots = [
        (number * _ORDER_STEP + _ORDER_STEP // 2, height - point.place * _ORDER_ROW)
        for number, point in enumerate(points)
    ]
    line = "L".join(f"{x} {y}" for x, y in spots)
    marks = "".join(_draw_mark(x, y, point.kind) for (x, y), point in zip(spots, points, strict=True))
    return Markup(  # noqa: S704 - of numbers and our own words
        f'<svg class="order" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-labelledby="{label_id}"><path class="line" d="M{line}"/>{marks}</svg>'
    )


def _draw_mark(x: int, y: int, kind: str) -> str:
    if "late" in kind.split():  # late updates have their own shape too, not only their own colour
        return f'<path class="{kind}" d="M{x} {y - 7}l7 7l-7 7l-7-7z"/>'
    return f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"/>'
