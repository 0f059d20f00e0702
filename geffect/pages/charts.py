"""What a chart shows: curves over steps, or blocks by steps in colour.

A chart is data. `geffect.pages.pictures` makes a picture of it, for paper and for readers without
scripts; in the browser uPlot draws the same and shows the value under the pointer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geffect.spans import largest_of_spans
from geffect.text import plain

from .scales import Scale, Tick

Palette = Sequence[str]
"""Colours from the low to the high end of a scale, as #rrggbb."""

UNDEFINED = "#bdbdbd"
"""The colour of what has no finite value."""

LABEL = 22
"""So many characters of a name fit beside an axis."""


@dataclass(frozen=True)
class Series:
    """One curve.

    - `steps`, `values`: as long as each other, by rising steps; NaN leaves a gap.
    - `dashes`: lengths of strokes and gaps in pixels, none for a solid line.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: str
    dashes: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """Curves over the steps, on one scale.

    - `title`: what the values are, with their unit.
    - `across`: what is counted from left to right.
    """

    title: str
    scale: Scale
    series: Sequence[Series]
    across: str = "step"

    def told(self) -> dict[str, Any]:
        """What the browser draws: steps that curves share stand once."""
        tables: list[list[list[float | None]]] = []
        for one in self.series:
            steps: list[float | None] = [int(step) for step in one.steps]
            if not tables or tables[-1][0] != steps:
                tables.append([steps])
            tables[-1].append(_numbers(one.values))
        return {
            "kind": "lines",
            "title": plain(self.title),
            "across": self.across,
            "y": self.scale.told(),
            "tables": tables,
            "series": [
                {"name": plain(one.name), "colour": one.colour, "dash": [*one.dashes]}
                for one in self.series
            ],
        }


@dataclass(frozen=True)
class Map:
    """A cell a block and step, in colour.

    - `values`: Float64[block, step]; what is not finite is grey.
    - `says`: words for values that are 0 or 1, such as ("no", "yes"); none for other values.
    """

    title: str
    scale: Scale
    steps: Sequence[int]
    blocks: Sequence[str]
    values: NDArray[np.float64]
    palette: Palette
    says: tuple[str, str] | None = None
    across: str = "step"

    def told(self) -> dict[str, Any]:
        """What the browser draws."""
        return {
            "kind": "map",
            "title": plain(self.title),
            "across": self.across,
            "scale": self.scale.told(),
            "steps": [int(step) for step in self.steps],
            "blocks": [plain(name) for name in self.blocks],
            "labels": [short(name) for name in self.blocks],
            "rows": [_numbers(row) for row in self.values],
            "palette": [*self.palette],
            "says": self.says,
            "bar": self.bar(),
        }

    def bar(self) -> list[Tick]:
        """The labels of the colour bar, each with its place from 0 to 1."""
        if self.says:
            return [(0.25, self.says[0]), (0.75, self.says[1])]
        return [(self.scale.place(value), label) for value, label in self.scale.ticks(most=4)]

    def thinned(self, count: int) -> "Map":
        """At most so many columns: of each span of steps the value of the largest size."""
        steps = np.asarray(self.steps, dtype=float)
        starts, values = largest_of_spans(steps, self.values, count)
        return replace(self, steps=[int(step) for step in starts], values=values)

    def colours(self) -> NDArray[np.int64]:
        """The index of the colour of each cell, and -1 where it has no finite value."""
        known = np.isfinite(self.values)
        place = self.scale.places(np.where(known, self.values, self.scale.high))
        most = len(self.palette) - 1
        found = np.clip(np.rint(place * most), 0, most).astype(np.int64)
        return np.where(known, found, -1)


Chart = Lines | Map


def as_json(chart: Chart) -> str:
    """The data of a chart as JSON that can stand inside of a script element of HTML.

    >>> as_json(Lines("<b>", Scale("linear", 0.0, 1.0), [])).startswith(
    ...     '{"kind":"lines","title":"\\\\u003cb>",'
    ... )
    True
    """
    told = json.dumps(chart.told(), separators=(",", ":"), allow_nan=False)
    return told.replace("<", "\\u003c")


def short(name: str, most: int = LABEL) -> str:
    """A name as it stands beside an axis, or where there is more room.

    >>> short("layer 0"), short("a" * 40 + "b" * 40, most=8)
    ('layer 0', 'aaaa…bbb')
    """
    written = plain(name)
    if len(written) <= most:
        return written
    return f"{written[: most // 2]}…{written[1 - most // 2 :]}"


def marked(count: int, most: int) -> list[int]:
    """Which of so many rows or columns have a label: the first, every n-th, and the last.

    >>> marked(10, 4)
    [0, 3, 6, 9]
    """
    stride = max(1, -(-(count - 1) // max(1, most - 1)))
    inner = [i for i in range(0, count - 1, stride) if count - 1 - i >= stride / 2]
    return [*inner, count - 1] if count else []


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> list[float | None]:
    """With four digits, as tables show them; None where there is no finite number."""
    return [float(f"{value:.4g}") if isfinite(value) else None for value in values]
