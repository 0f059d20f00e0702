"""The charts of one run of a report: maps of blocks by steps, and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from geffect.numbers import percent
from geffect.pages import Lines, Map, Scale, Series
from geffect.pages.charts import Chart, Palette
from geffect.plots.inks import DIVERGING, Ink, inks
from geffect.plots.rectification import COURSES, MARKS, UNMARKED
from geffect.scores import Score, score_of
from geffect.spans import thinned_course

from .read import Numbers, Read, grid

NUMBERS = 240_000
"""So many numbers all maps of a page have, at most: then spans of steps are shown."""

FEWEST = 40
"""So many spans are shown at least."""


COSINES, SHARES = Scale("linear", -1.0, 1.0), Scale("linear", 0.0, 1.0)

MARK = "#44546a"
"""The colour of a mark, which is neither good nor bad by itself."""


@dataclass(frozen=True)
class Figure:
    """A chart, with what stands below it."""

    chart: Chart
    caption: str
    remark: str = ""


def diverging(count: int = 129) -> Palette:
    """Brown to purple, white at zero: what all pictures of signed scores have."""
    return [to_hex(DIVERGING(share)) for share in np.linspace(0.0, 1.0, count)]


@dataclass(frozen=True)
class Scales:
    """The scales of the maps of a report: one for each unit, so that runs compare."""

    of_unit: Mapping[str, Scale]
    palette: Palette

    @classmethod
    def of(cls, several: Sequence[Read]) -> "Scales":
        values: dict[str, list[Numbers]] = {}
        spread: dict[str, Score] = {}
        for read in several:
            for _, part in read.block_effects.groupby("effect", observed=True, sort=False):
                score = score_of(part)
                spread.setdefault(score.unit, score)
                values.setdefault(score.unit, []).append(part["value"].to_numpy(dtype=float))
        return cls(
            {
                unit: Scale.symmetric(np.concatenate(parts), spread[unit].scale)
                for unit, parts in values.items()
            },
            diverging(),
        )


@dataclass(frozen=True)
class OfRun:
    """The charts of a run, with the colours of all runs of the page.

    - `most`: so many columns a map has, and values a curve; of more steps, spans are shown.
    """

    read: Read
    scales: Scales
    most: int

    def effects(self) -> list[Figure]:
        """A map of each G-effect: unlearning and retaining, and what was made of them."""
        made = []
        for effect, part in self.read.block_effects.groupby("effect", observed=True, sort=False):
            score = score_of(part)
            good = "Negative is good." if str(effect).startswith("unl") else "Negative is damage."
            chart = self._map(part, f"{effect}: {score.full}", self.scales.of_unit[score.unit])
            made.append(Figure(chart, chart.title, good))
        return made

    def cosine(self) -> Figure:
        """The map of the cosine of objective and retain gradient."""
        table = self.read.block_cosine
        chart = self._map(table, score_of(table).full, COSINES)
        return Figure(chart, chart.title, "Below zero the two are in conflict.")

    def course(self) -> list[Figure]:
        """The G-effects of the model over the steps, a panel for each unit."""
        table = self.read.effects
        named = inks([str(name) for name in table["effect"].unique()])
        made = []
        for _, own in table.groupby("unit", sort=False):
            score = score_of(own)
            courses = {
                str(name): part["value"].to_numpy(dtype=float)
                for name, part in own.groupby("effect", observed=True, sort=False)
            }
            scale = Scale.signed(own["value"], score.scale)
            chart = self._lines(f"model: {score.full}", scale, courses, named)
            made.append(Figure(chart, chart.title))
        return made

    def losses(self) -> list[Figure]:
        """The losses over the steps, where there are any."""
        known = {name: v for name, v in self.read.losses.items() if np.isfinite(v).any()}
        if not known:
            return []
        values = np.concatenate([*known.values()])
        scale = Scale.positive(values)
        if np.nanmin(values) < 0:
            scale = Scale.signed(values, "symlog")
        chart = self._lines("losses", scale, known, inks([*known]))
        return [Figure(chart, "losses as they were given")]

    def weights(self) -> list[Figure]:
        """The means of the implicit weights, where the run has them."""
        own = self.read.weights
        if own is None:
            return []
        courses = {
            str(name): part["value"].to_numpy(dtype=float)
            for name, part in own.groupby("weight", observed=True, sort=False)
        }
        scale = Scale.positive(own["value"])
        chart = self._lines("mean implicit weight", scale, courses, inks([*courses]))
        return [Figure(chart, chart.title)]

    def rectification(self) -> list[Figure]:
        """Cosines with the retain average before, after and as applied; where it fired or broke."""
        made = []
        for by, table in self.read.rectifications.items():
            sets = [str(name) for name in table["against"].unique()]
            for against in sets:
                own = table[table["against"].astype(str) == against]
                which = f" against {against}" if len(sets) > 1 else ""
                of = self._of_model if by == "model" else self._of_blocks
                made += of(own, f"{which}, by {by}" if by != "model" else which)
        return made

    def _of_model(self, own: pd.DataFrame, which: str) -> list[Figure]:
        courses = {name: _values(own, quantity) for quantity, (name, _) in COURSES.items()}
        known = {name: v for name, v in courses.items() if np.isfinite(v).any()}
        drawn = dict(COURSES.values())
        curves = self._lines(f"cosine with the retain average{which}", COSINES, known, drawn)
        rows = {name: _values(own, quantity) for quantity, (name, _) in MARKS.items()}
        marks = self._marks(f"where it acted{which}", [*rows], np.stack([*rows.values()]))
        shares = ", ".join(f"{name} {_share(row)}" for name, row in rows.items())
        made = [Figure(curves, curves.title, "Below zero is harm.")] if known else []
        return [*made, Figure(marks, marks.title, f"Of the steps: {shares}.")]

    def _of_blocks(self, own: pd.DataFrame, which: str) -> list[Figure]:
        made = []
        for quantity in ("cosine_before", "cosine_after"):
            title = f"cosine with the retain average, {COURSES[quantity][0]}{which}"
            chart = self._map(own[own["quantity"] == quantity], title, COSINES)
            made.append(Figure(chart, title, "Below zero is harm."))
        for quantity, (name, _) in MARKS.items():
            _, blocks, values = grid(own[own["quantity"] == quantity])
            marks = self._marks(f"{name}{which}", blocks, values)
            made.append(Figure(marks, marks.title, f"{_share(values)} of steps and blocks."))
        return made

    def _map(self, table: pd.DataFrame, title: str, scale: Scale) -> Map:
        steps, blocks, values = grid(table)
        palette = self.scales.palette
        return self._fitted(Map(title, scale, steps, blocks, values, palette))

    def _marks(self, title: str, blocks: Sequence[str], values: Numbers) -> Map:
        palette = [UNMARKED, MARK]
        return self._fitted(
            Map(title, SHARES, self.read.steps, blocks, values, palette, ("no", "yes"))
        )

    def _fitted(self, chart: Map) -> Map:
        chart = replace(chart, across=self.read.across)
        return chart.thinned(self.most) if len(chart.steps) > self.most else chart

    def _lines(
        self, title: str, scale: Scale, courses: Mapping[str, Numbers], drawn: Mapping[str, Ink]
    ) -> Lines:
        series = [
            series_of(self.read, values, drawn[name], self.most, name)
            for name, values in courses.items()
        ]
        return Lines(title, scale, series, self.read.across)


def series_of(read: Read, values: Numbers, ink: Ink, most: int, name: str) -> Series:
    """The curve of a run in its ink; of more steps than `most`, the ends of each span."""
    dashes = [] if ink.dashes == "-" else [round(1.6 * float(part), 1) for part in ink.dashes[1]]
    steps, values = thinned_course(np.array(read.steps, dtype=float), values, max(1, most // 4))
    return Series(name, [*map(int, steps)], [*map(float, values)], ink.colour, dashes)


def _values(table: pd.DataFrame, quantity: str) -> Numbers:
    return table.loc[table["quantity"] == quantity, "value"].to_numpy(dtype=float)


def _share(values: Numbers) -> str:
    known = values[~np.isnan(values)]
    return percent(known.mean()) if len(known) else "undefined"


def most_of_maps(read: Read, runs: int) -> int:
    """So many columns a map of a run may have, that those of all runs of a page find room."""
    blocks = read.block_effects.groupby("effect", observed=True).size().sum() / max(
        1, len(read.steps)
    )
    return max(FEWEST, int(NUMBERS / (runs * (1.2 * blocks + 4))))
