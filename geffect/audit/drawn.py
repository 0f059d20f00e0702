"""Pictures of an audit as SVG in a page: values with their intervals, and curves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10

from geffect.text import in_html

from .models import ORIGINAL, RETRAINED, UNLEARNED

INK = {ORIGINAL: "#333333", RETRAINED: "#00875f", UNLEARNED: "#b3261e"}
"""The colour of each model; their marks differ too."""

DASHES = {ORIGINAL: "2 3", RETRAINED: "6 3", UNLEARNED: ""}

LABELS, WIDTH, ROW = 300, 460, 24
"""The room of labels, of the values, and of a row, in pixels."""

LETTER = 7
"""The width of a letter, at most and on the mean, in pixels."""


@dataclass(frozen=True)
class Dot:
    """A value of a model in a row, with its interval; NaN bounds draw none."""

    label: str
    model: str
    value: float
    low: float
    high: float


def key(model: str) -> str:
    """The mark of a model in the pictures, in its colour, for text beside them.

    >>> key("retrained")
    '<span style="color:#00875f">○</span>'
    """
    return f'<span style="color:{INK[model]}">{"●" if model == UNLEARNED else "○"}</span>'


def dots(dots: Sequence[Dot], lines: Mapping[str, float] | None = None) -> str:
    """A row a label, a mark a model, and a line at each of some values, by what it says.

    >>> dots([Dot("int4 <b>", "unlearned", 0.5, 0.4, 0.6)]).count("<circle")
    1
    """
    lines = lines or {}
    there = [dot for dot in dots if isfinite(dot.value)]
    labels = list(dict.fromkeys(dot.label for dot in there))
    values = [x for d in there for x in (d.value, d.low, d.high) if isfinite(x)]
    scale = _Scale.of([*values, *lines.values(), 0.0], WIDTH)
    bottom = ROW * (len(labels) + 1)
    below = _levels({said: scale.at(value) for said, value in lines.items()})
    parts = [_line(LABELS + scale.at(0), 0, bottom, "#dde", "")]
    for said, value in lines.items():
        x, under = LABELS + scale.at(value), bottom + ROW * (below[said] + 1) - 6
        parts += [_line(x, 0, bottom, "#889", "3 3"), _text(x, under, said, "middle", "#667")]
    for row, label in enumerate(labels):
        y = ROW * (row + 0.8)
        parts.append(_text(LABELS - 12, y + 4, label, "end"))
        for dot in (d for d in there if d.label == label):
            x, ink = LABELS + scale.at(dot.value), INK.get(dot.model, "#333")
            if isfinite(dot.low) and isfinite(dot.high):
                ends = LABELS + scale.at(dot.low), LABELS + scale.at(dot.high)
                parts.append(_line(ends[0], y, ends[1], ink, "", flat=True))
            fill = ink if dot.model == UNLEARNED else "white"
            said = f"{dot.model}: {dot.value:.3g}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{ink}" '
                f'stroke-width="1.5"><title>{in_html(said)}</title></circle>'
            )
    for value in scale.ticks:
        parts.append(_text(LABELS + scale.at(value), bottom + 4, f"{value:g}", "middle"))
    height = bottom + ROW * (max(below.values(), default=0) + 1)
    return _svg(LABELS + WIDTH + 40, height, parts)


def _levels(places: Mapping[str, float]) -> dict[str, int]:
    """In which line below the axis each word stands, so that none covers another.

    >>> _levels({"hidden": 10.0, "remembers": 30.0, "original": 200.0})
    {'hidden': 0, 'remembers': 1, 'original': 0}
    """
    ends: list[float] = []
    levels: dict[str, int] = {}
    for said, x in sorted(places.items(), key=lambda place: place[1]):
        half = LETTER * (len(said) + 1) / 2
        free = (level for level, end in enumerate(ends) if end <= x - half)
        levels[said] = next(free, len(ends))
        ends[levels[said] : levels[said] + 1] = [x + half]
    return levels


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_says: str, y_says: str) -> str:
    """A line a model, through its points in their order.

    >>> curves({"unlearned": [(0, 1.0), (4, 2.0)]}, "steps", "nats").count("<polyline")
    1
    """
    height, left = 240, 70
    finite = {
        name: [(x, y) for x, y in points if isfinite(x) and isfinite(y)]
        for name, points in series.items()
    }
    points = [point for own in finite.values() for point in own]
    if not points:
        return ""
    across = _Scale.of([x for x, _ in points], WIDTH)
    up = _Scale.of([y for _, y in points], height - 60)
    parts = []
    for value in up.ticks:
        y = height - 40 - up.at(value)
        parts.append(_line(left, y, left + WIDTH, "#dde", "", flat=True))
        parts.append(_text(left - 8, y + 4, f"{value:g}", "end"))
    parts += [
        _text(left + across.at(value), height - 22, f"{value:g}", "middle")
        for value in across.ticks
    ]
    for name, own in finite.items():
        drawn = " ".join(f"{left + across.at(x):.1f},{height - 40 - up.at(y):.1f}" for x, y in own)
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{INK.get(name, "#333")}" '
            f'stroke-width="2" stroke-dasharray="{DASHES.get(name, "")}"/>'
        )
        x, y = own[-1]
        at = left + across.at(x) + 6, height - 36 - up.at(y)
        parts.append(_text(*at, name, "start", INK.get(name, "#333")))
    parts.append(_text(left + WIDTH / 2, height - 4, x_says, "middle", "#667"))
    parts.append(_text(left, 12, y_says, "start", "#667"))
    return _svg(left + WIDTH + 110, height, parts)


@dataclass(frozen=True)
class _Scale:
    """Where values lie on so many pixels."""

    low: float
    high: float
    pixels: float

    @classmethod
    def of(cls, values: Iterable[float], pixels: float) -> "_Scale":
        found = [*values]
        low, high = min(found), max(found)
        room = (high - low or 1.0) * 0.04
        return cls(low - room, high + room, pixels)

    def at(self, value: float) -> float:
        return self.pixels * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        step = (self.high - self.low) / 5
        size = 10.0 ** floor(log10(step))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= step)
        first = -(-self.low // step)
        count = int((self.high - first * step) // step) + 1
        return [float(f"{(first + i) * step:.6g}") for i in range(count)]


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'font-size="12" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def _line(x: float, y: float, to: float, ink: str, dashes: str, *, flat: bool = False) -> str:
    x2, y2 = (to, y) if flat else (x, to)
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}" '
        f'stroke-width="1.5" stroke-dasharray="{dashes}"/>'
    )


def _text(x: float, y: float, said: str, anchor: str, ink: str = "#1d2129") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{in_html(said)}</text>'
    )
