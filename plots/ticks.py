"""Ticks: of blocks by their names, of decades and of positive numbers in plain text."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter, FuncFormatter, Locator, LogLocator, NullLocator

APART = 1.3
"""Of the size of the text: how far labels stand from each other at least."""

RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


class BlockTicks(Locator):
    """Ticks at the first and the last block, at those that are no layer, and at every n-th layer.

    n follows from the room that the axis has when it is drawn. Names that would cover each other
    share a tick.
    """

    def __init__(self, axis: Axis, names: Sequence[str], size: float, most: int) -> None:
        self._of, self._names, self._size, self._most = axis, names, size, most
        self._labels: dict[float, str] = {}

    @classmethod
    def put(cls, axis: Axis, names: Sequence[str], size: float, *, most: int = 20) -> None:
        """Give an axis its ticks, and their labels in a size."""
        ticks = cls(axis, names, size, most)
        axis.set_major_locator(ticks)
        axis.set_major_formatter(FuncFormatter(lambda place, _: ticks._labels.get(place, "")))
        if isinstance(axis, XAxis):
            for label in axis.get_ticklabels():  # those of ticks that come later follow the first
                label.set(**slant(axis.axes, names, size))

    def __call__(self) -> Sequence[float]:
        low, high = sorted(self._of.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        seen = [i for i in range(len(self._names)) if vmin <= i <= vmax]
        if not seen:
            return []
        box, figure = self._of.axes.bbox, self._of.get_figure(root=True)
        length = box.width if isinstance(self._of, XAxis) else box.height
        room = 72 * length / (figure.dpi if figure else 72) / (APART * self._size)
        first = seen[0]
        placed = ticked([self._names[i] for i in seen], max(2, min(self._most, int(room))))
        self._labels = {first + place: name for place, name in placed.items()}
        return list(self._labels)


def ticked(names: Sequence[str], room: int) -> dict[float, str]:
    """The names that are shown where there is room for so many, by their places.

    >>> ticked(["embedding", *(f"layer {i}" for i in range(9)), "norm", "head"], 6)
    {0.0: 'embedding', 3.0: 'layer 2', 5.0: 'layer 4', 7.0: 'layer 6', 10.5: 'norm, head'}
    """
    count = len(names)
    if count <= room:
        return {float(place): name for place, name in enumerate(names)}
    gap = count / room
    kinds = [re.sub(r"\d+", "#", name) for name in names]
    often = Counter(kinds)
    odd = [place for place, kind in enumerate(kinds) if often[kind] == 1]
    if len(odd) > room / 2:  # names without an order that could be counted on
        odd = []
    always = sorted({0, *odd, count - 1})
    shown = {
        (group[0] + group[-1]) / 2: _together([names[place] for place in group])
        for group in _crowds(always, gap)
    }
    stride = int(np.ceil(gap))
    is_odd = set(odd)
    for odd_ones, run in groupby(range(count), key=is_odd.__contains__):
        for place in () if odd_ones else list(run)[::stride]:
            if all(abs(place - other) >= gap for other in shown):
                shown[float(place)] = names[place]
    return {float(place): shown[place] for place in sorted(shown)}


def _crowds(places: Sequence[int], gap: float) -> list[list[int]]:
    """Places in groups: those of two groups are further apart than the gap."""
    crowds = [[places[0]]]
    for before, place in pairwise(places):
        if place - before < gap:
            crowds[-1].append(place)
        else:
            crowds.append([place])
    return crowds


def _together(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"


class Decades(Locator):
    """Zero and, on either side of it, as many powers of ten as stand apart when they are drawn."""

    def __init__(self, axis: Axis, threshold: float, size: float) -> None:
        self._of, self._threshold, self._size = axis, threshold, size

    @classmethod
    def put(cls, axis: Axis, threshold: float, size: float) -> None:
        """Give a symmetric-log axis its ticks, and their labels in a size."""
        axis.set_major_locator(cls(axis, threshold, size))
        axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        axis.set_minor_locator(NullLocator())

    def __call__(self) -> Sequence[float]:
        low, high = sorted(self._of.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        reach = max(abs(vmin), abs(vmax))
        for most in (3, 2, 1):
            ticks = decades(self._threshold, reach, most)
            zero = len(ticks) // 2
            for shown in (ticks, [*ticks[: zero - 1], 0.0, *ticks[zero + 2 :]]):
                on_view = [tick for tick in shown if vmin <= tick <= vmax]
                if len(shown) > 1 and self._stand_apart(on_view):
                    return on_view
        return [tick for tick in (0.0,) if vmin <= tick <= vmax]

    def _stand_apart(self, ticks: Sequence[float]) -> bool:
        box, figure = self._of.axes.bbox, self._of.get_figure(root=True)
        is_x = isinstance(self._of, XAxis)
        length = 72 * (box.width if is_x else box.height) / (figure.dpi if figure else 72)
        transform = self._of.get_transform()
        low, high = sorted(transform.transform(np.array(self._of.get_view_interval())))
        places = transform.transform(np.array(ticks)) * length / (high - low)
        sizes = [printed(power(tick), self._size) if is_x else self._size for tick in ticks]
        needed = [(a + b) / 2 + (APART - 1) * self._size for a, b in pairwise(sizes)]
        return bool((np.diff(places) >= needed).all())


def decades(threshold: float, reach: float, most: int = 3) -> list[float]:
    """Zero and, up to where values reach, at most so many powers of ten on either side of it.

    >>> decades(1e-3, 300.0)
    [-100.0, -1.0, -0.01, 0.0, 0.01, 1.0, 100.0]
    """
    # The small guard keeps a power of ten its own decade after the rounding of the logarithm.
    high = int(np.floor(np.log10(reach) + 1e-9))
    low = min(high, int(np.round(np.log10(threshold))))
    stride = -(-(high - low + 1) // most)
    powers = [float(f"1e{exponent}") for exponent in range(high, low - 1, -stride)]
    return [*(-power for power in powers), 0.0, *reversed(powers)]


def slant(ax: Axes, names: Sequence[str], size: float, angle: float = 45) -> dict[str, Any]:
    """How names below axes are turned: not at all where they stand beside each other upright."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    each = 0.8 * 72 * figure.get_figwidth() * ax.get_position().width / max(1, len(names))
    if max((printed(name, size) for name in names), default=0.0) + size <= each:
        return {}
    return {"rotation": angle, "ha": "right", "rotation_mode": "anchor"}


@cache
def printed(text: str, size: float) -> float:
    """How wide a line of text is, in points."""
    width, _, _ = text_to_path.get_text_width_height_descent(
        text.replace(r"\$", "$"), FontProperties(size=size), ismath=False
    )
    return float(width)


def has_glyph(*characters: str) -> bool:
    """Whether the session's fonts have all of the characters."""
    return all(_has(character, *mpl.rcParams["font.family"]) for character in characters)


@cache
def _has(character: str, *families: str) -> bool:
    """Whether one of the fonts has the character."""
    fonts = (font_manager.findfont(FontProperties(family=[family])) for family in families)
    return any(font_manager.get_font(font).get_char_index(ord(character)) for font in fonts)


def power(value: float) -> str:
    """A power of ten as text of one size, or a plain number where it is none.

    >>> power(1e-3), power(0.0), power(1000.0), power(0.25)
    ('10⁻³', '0', '10³', '0.25')
    """
    if value == 0:
        return "0"
    exponent = np.log10(abs(value))
    sign = Formatter.fix_minus("-") if value < 0 else ""
    if abs(exponent - round(exponent)) > 1e-6:
        return f"{sign}{abs(value):g}"
    written = str(round(exponent))
    if not has_glyph(*written.translate(RAISED)):
        return f"{sign}1e{written}"
    return f"{sign}10{written.translate(RAISED)}"


class PlainLog(Formatter):
    """Numbers on a logarithmic axis as text of one size and one kind: 0.1, 20, or 10⁰, 10⁵."""

    def __init__(self, most: float = np.inf) -> None:
        self._most = most  # decades on view up to which they are written

    def __call__(self, x: float, pos: int | None = None) -> str:
        low, high = sorted(self.axis.get_view_interval()) if self.axis else (1.0, 1.0)
        if np.log10(high / low) > self._most:
            return ""
        is_plain = low > 1e-4 and high < 1e5  # all of them, or none
        return f"{x:g}" if is_plain else power(float(f"{x:.3g}"))


def log_scale(ax: Axes) -> None:
    """Gives y a logarithmic scale and ticks in plain text, also within a decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_major_formatter(PlainLog())
    ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0), numticks=9))
    ax.yaxis.set_minor_formatter(PlainLog(most=2.0))


def thinned(count: int, most: int = 20) -> list[int]:
    """At most `most` evenly spaced indices out of `count`, the first and the last among them.

    >>> thinned(34)[:3], thinned(34)[-2:]
    ([0, 2, 4], [30, 33])
    """
    stride = max(1, -(-count // most))
    indices = list(range(0, count, stride))
    if indices and indices[-1] != count - 1:
        # The last one is too close to its neighbour to stand beside it: it takes its place.
        indices[-1] = count - 1
    return indices
