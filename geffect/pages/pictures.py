"""Pictures of charts as SVG: for paper, and for readers whose browser runs no scripts.

matplotlib takes a fifth of a second a panel, and a report of twenty runs has two hundred of them.
"""

import base64
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from geffect.spans import thinned_course
from geffect.text import in_html

from .charts import UNDEFINED, Chart, Lines, Map, Palette, Series, marked, short
from .scales import Scale

WIDTH, LEFT, RIGHT, TOP = 480, 56, 12, 8
"""Of a picture, in its own units: a letter is some 6 wide and 11 tall."""

TALL = 150
"""The height of the panel of curves."""

POINTS = 240
"""So many columns a picture of a map has; of a curve the ends of half as many spans are drawn."""

LETTER = 6.8
BAR = 10

KEYED = 56
"""So many letters of a curve's name fit on a row of the key."""


def picture(chart: Chart) -> str:
    """The chart as an SVG element."""
    return _lines(chart) if isinstance(chart, Lines) else _map(chart)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{in_html(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _lines(chart: Lines) -> str:
    steps = [step for one in chart.series for step in one.steps]
    across = _across(min(steps, default=0), max(steps, default=1))
    scale = Scale("linear", *across)
    wide, bottom = WIDTH - LEFT - RIGHT, TOP + TALL
    parts = [*_bottom(chart.across, scale, LEFT, wide, bottom)]
    for value, label in chart.scale.ticks():
        y = bottom - TALL * chart.scale.place(value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}h{wide}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{in_html(label)}</text>'
        )
    for one in chart.series:
        d = _path(one, scale, chart.scale, wide, bottom)
        dashes = f' stroke-dasharray="{" ".join(map(str, one.dashes))}"' if one.dashes else ""
        parts.append(f'<path class="line" d="{d}" stroke="{one.colour}"{dashes}/>')
    key, height = _key(chart.series, bottom + 40)
    return _svg(chart.title, height, [*parts, *key])


def _path(one: Series, x: Scale, y: Scale, wide: float, bottom: float) -> str:
    """The curve; a value between two gaps is a stroke of its own, and ends are round."""
    given = [np.array(of, dtype=float) for of in (one.steps, one.values)]
    steps, values = thinned_course(given[0], given[1], POINTS // 2)
    known = np.isfinite(values)
    across = LEFT + wide * x.places(steps)
    up = bottom - TALL * y.places(np.where(known, np.clip(values, y.low, y.high), y.high))
    d, pen = [], "M"
    for right, down, there in zip(across, up, known, strict=True):
        if not there:
            pen = "M"
            continue
        at = f"{right:.1f} {down:.1f}"
        d.append(f"{pen}{at}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(d)


def _key(series: Sequence[Series], y: float) -> tuple[list[str], float]:
    """The names of the curves below the panel, on as many rows as they need."""
    x, parts = float(LEFT), []
    for one in series:
        name = short(one.name, KEYED)
        wide = 30 + LETTER * len(name)
        if x + wide > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 16
        dashes = f' stroke-dasharray="{" ".join(map(str, one.dashes))}"' if one.dashes else ""
        parts.append(
            f'<path class="line" d="M{x:.0f} {y - 4:.0f}h18" stroke="{one.colour}"{dashes}/>'
            f'<text x="{x + 22:.0f}" y="{y:.0f}">{in_html(name)}</text>'
        )
        x += wide
    return parts, y + 8


def _map(chart: Map) -> str:
    names = [short(name) for name in chart.blocks]
    left = 14 + LETTER * max(map(len, names), default=1)
    wide, tall = WIDTH - left - RIGHT, min(max(15 * len(names), 30), 260)
    if len(chart.steps) > POINTS:
        chart = chart.thinned(POINTS)
    ends = edges(chart.steps)
    scale = Scale("linear", ends[0], ends[-1])
    parts = [
        _image(chart, ends, left, wide, tall),
        *_bottom(chart.across, scale, left, wide, TOP + tall),
    ]
    for index in marked(len(names), int(tall // 13)):
        y = TOP + tall * (index + 0.5) / len(names) + 3.5
        name = in_html(names[index])
        parts.append(f'<text x="{left - 6:.0f}" y="{y:.1f}" text-anchor="end">{name}</text>')
    y = TOP + tall + 38
    strip = np.arange(len(chart.palette))[np.newaxis, :]
    parts.append(_pixels(strip, chart.palette, left, y, wide, BAR))
    for place, label in chart.bar():
        at = left + wide * place
        parts.append(f'<text x="{at:.1f}" y="{y + 22:.0f}" text-anchor="middle">{label}</text>')
    return _svg(chart.title, y + 28, parts)


def _image(chart: Map, ends: NDArray[np.float64], left: float, wide: float, tall: float) -> str:
    """The cells: a column of pixels reaches as far over the steps as a column of the map."""
    columns = POINTS if len(ends) > 2 else 1
    middles = ends[0] + (np.arange(columns) + 0.5) / columns * (ends[-1] - ends[0])
    of = np.clip(np.searchsorted(ends, middles) - 1, 0, len(ends) - 2)
    return _pixels(chart.colours()[:, of], chart.palette, left, TOP, wide, tall)


def _pixels(
    of: NDArray[np.int64], palette: Palette, x: float, y: float, wide: float, tall: float
) -> str:
    inside = base64.b64encode(png(of, palette)).decode()
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{inside}"/>'
    )


def _bottom(across: str, scale: Scale, left: float, wide: float, y: float) -> Iterator[str]:
    yield f'<path class="axis" d="M{left:.0f} {y}h{wide:.0f}"/>'
    for value, label in scale.ticks():
        if value == int(value):
            x = left + wide * scale.place(value)
            yield f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{label}</text>'
    yield f'<text x="{left + wide:.0f}" y="{y + 27}" text-anchor="end">{across}</text>'


def _across(first: float, last: float) -> tuple[float, float]:
    return (first, last) if last > first else (first - 0.5, first + 0.5)


def edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Where the columns of a map end: half way between neighbours.

    >>> edges([0, 2, 6]).tolist(), edges([3]).tolist()
    ([-1.0, 1.0, 4.0, 8.0], [2.5, 3.5])
    """
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    between = (at[:-1] + at[1:]) / 2
    return np.array([2 * at[0] - between[0], *between, 2 * at[-1] - between[-1]])


def png(of: NDArray[np.int64], palette: Palette) -> bytes:
    """An image of at most 255 colours: `of` is the index of each pixel's, -1 for undefined.

    >>> png(np.array([[0, -1]]), ["#ff0000"])[:8]
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    colours = bytes.fromhex("".join(colour[1:] for colour in (*palette, UNDEFINED)))
    pixels = np.where(of < 0, len(palette), of).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    tall, wide = pixels.shape
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">2I5B", wide, tall, 8, 3, 0, 0, 0)),
            (b"PLTE", colours),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
    )
