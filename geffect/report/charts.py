"""The charts of a report: overlays of all runs, and the maps and curves of each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from geffect.analysis import implicit_weights
from geffect.groups import By
from geffect.pages import Lines, Map, Scale, Series
from geffect.pages.charts import Chart, Palette
from geffect.plots.rectification import COURSES, MARKS, UNMARKED
from geffect.plots.style import DIVERGING, DOTTED, SOLID, SPARE, Dashes, Ink, inks
from geffect.scores import Score, score_of

from .read import Numbers, Read, grid

NUMBERS = 240_000
"""So many numbers all maps of a page have, at most; then every n-th step is shown."""

POINTS = 120_000
"""The same of all curves."""

FEWEST = 40
"""So many steps are shown at least."""


@dataclass(frozen=True)
class Figure:
    """A chart, with what stands below it."""

    chart: Chart
    caption: str
    remark: str = ""


def diverging(count: int = 129) -> Palette:
    """Brown to purple, white at zero: what all pictures of signed scores have."""
    return [_hex(DIVERGING(share)) for share in np.linspace(0.0, 1.0, count)]


def overlays(several: Sequence[Read]) -> list[Figure]:
    """All runs in the same panel: risks, G-effects and cosine of the model, over the steps."""
    drawn = run_inks([read.name for read in several])
    stride = _strides(several, curves=6)
    made = []
    for title, of, scaled, caption in _COURSES:
        courses = {read.name: of(read) for read in several}
        known = [values for values in courses.values() if np.isfinite(values).any()]
        if not known:
            continue
        series = [
            _series(read.name, read, courses[read.name], drawn[read.name], stride[read.name])
            for read in several
            if len(courses[read.name])
        ]
        made.append(Figure(Lines(title, scaled(np.concatenate(known)), series), title, caption))
    return made


_NATS = "nats per unit learning rate"

_COURSES: tuple[tuple[str, Callable[[Read], Numbers], Callable[[Numbers], Scale], str], ...] = (
    (
        "forget risk (nats)", lambda read: read.losses.get("forget", np.array([])),
        Scale.positive, "High means forgotten.",
    ),
    (
        "retain risk (nats)", lambda read: read.losses.get("retain", np.array([])),
        Scale.positive, "Low means kept.",
    ),
    (
        f"unlearning G-effect ({_NATS})", lambda read: read.effect("unlearning"),
        lambda values: Scale.signed(values, "symlog"), "Negative is good.",
    ),
    (
        f"retaining G-effect ({_NATS})", lambda read: read.effect("retaining"),
        lambda values: Scale.signed(values, "symlog"), "Negative is damage.",
    ),
    (
        "cosine of objective and retain gradient",
        lambda read: read.cosine["value"].to_numpy(dtype=float),
        lambda values: Scale("linear", -1.0, 1.0), "Below zero they are in conflict.",
    ),
    (
        "conflict, share of blocks", lambda read: _shares(read.conflicts),
        lambda values: Scale("linear", -0.02, 1.02), "1: all blocks of a step are in conflict.",
    ),
)  # fmt: skip


def _shares(table: pd.DataFrame) -> Numbers:
    return table.groupby("step")["value"].mean().to_numpy(dtype=float)


def run_inks(names: Sequence[str]) -> dict[str, Ink]:
    """A colour for each run, the dashes others where the colours begin again."""
    if len(names) <= len(SPARE):
        return dict(zip(names, SPARE, strict=False))
    turns: tuple[Dashes, ...] = (SOLID, (0, (5, 2)), DOTTED, (0, (8, 2, 1, 2)))
    return {
        name: Ink(SPARE[i % len(SPARE)].colour, turns[i // len(SPARE) % len(turns)])
        for i, name in enumerate(names)
    }


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


def of_effects(read: Read, scales: Scales, stride: int) -> list[Figure]:
    """A map of each G-effect: unlearning and retaining, and what was made of them."""
    made = []
    for effect, part in read.block_effects.groupby("effect", observed=True, sort=False):
        score = score_of(part)
        risk = str(effect).partition(",")[0]
        good = "Negative is good." if risk == "unlearning" else "Negative is damage."
        title = f"{effect}: {score.full}"
        made.append(
            Figure(_map(part, title, scales.of_unit[score.unit], scales, stride), title, good)
        )
    return made


def of_cosine(read: Read, scales: Scales, stride: int) -> Figure:
    """The map of the cosine of objective and retain gradient."""
    table = read.block_cosine
    title = score_of(table).full
    chart = _map(table, title, Scale("linear", -1.0, 1.0), scales, stride)
    return Figure(chart, title, "Below zero the two are in conflict.")


def of_course(read: Read, stride: int) -> list[Figure]:
    """The G-effects of the model over the steps, a panel for each unit."""
    named = inks([str(name) for name in read.effects["effect"].unique()])
    made = []
    for _, own in read.effects.groupby("unit", sort=False):
        score = score_of(own)
        values = own["value"].to_numpy(dtype=float)
        series = [
            _series(str(name), read, part["value"].to_numpy(dtype=float), named[str(name)], stride)
            for name, part in own.groupby("effect", observed=True, sort=False)
        ]
        chart = Lines(f"model: {score.full}", Scale.signed(values, score.scale), series)
        made.append(Figure(chart, chart.title))
    return made


def of_losses(read: Read, stride: int) -> Figure | None:
    """The losses over the steps."""
    known = {name: v for name, v in read.losses.items() if np.isfinite(v).any()}
    if not known:
        return None
    drawn = inks([*known])
    values = np.concatenate([*known.values()])
    kind = Scale.positive(values) if np.nanmin(values) >= 0 else Scale.signed(values, "symlog")
    series = [_series(name, read, v, drawn[name], stride) for name, v in known.items()]
    return Figure(Lines("losses", kind, series), "losses as they were given")


def of_rectification(read: Read, scales: Scales, stride: int) -> list[Figure]:
    """Cosines with the retain average before, after and as applied; where it fired or broke."""
    made = []
    for by, table in read.rectifications.items():
        sets = [str(name) for name in table["against"].unique()]
        for against in sets:
            own = table[table["against"].astype(str) == against]
            which = f" ({against})" if len(sets) > 1 else ""
            if by == "model":
                made += _rectified_model(read, own, which, stride)
            else:
                made += _rectified_blocks(own, by, which, scales, stride)
    return made


def _rectified_model(read: Read, own: pd.DataFrame, which: str, stride: int) -> list[Figure]:
    series = []
    for quantity, (name, ink) in COURSES.items():
        values = _values(own, quantity)
        if np.isfinite(values).any():
            series.append(_series(name, read, values, ink, stride))
    title = f"cosine with the retain average{which}, model"
    rows = [_values(own, quantity) for quantity in MARKS]
    marks = Map(
        f"marks of the steps{which}",
        Scale("linear", 0.0, 1.0),
        read.steps[::stride],
        [name for name, _ in MARKS.values()],
        np.stack(rows)[:, ::stride],
        _MARKED,
        ("no", "yes"),
    )
    shares = ", ".join(
        f"{name} {_share(row)}" for (name, _), row in zip(MARKS.values(), rows, strict=True)
    )
    curves = [
        Figure(Lines(title, Scale("linear", -1.0, 1.0), series), title, "Below zero is harm.")
    ]
    return [*(curves if series else []), Figure(marks, f"where it acted{which}", f"{shares}.")]


def _rectified_blocks(
    own: pd.DataFrame, by: By, which: str, scales: Scales, stride: int
) -> list[Figure]:
    made = []
    for quantity in ("cosine_before", "cosine_after"):
        part = own[own["quantity"] == quantity]
        title = f"cosine with the retain average, {COURSES[quantity][0]}{which}, by {by}"
        chart = _map(part, title, Scale("linear", -1.0, 1.0), scales, stride)
        made.append(Figure(chart, title, "Below zero is harm."))
    for quantity, (name, _) in MARKS.items():
        steps, blocks, values = grid(own[own["quantity"] == quantity])
        chart = Map(
            f"{name}{which}, by {by}", Scale("linear", 0.0, 1.0), steps[::stride], blocks,
            values[:, ::stride], _MARKED, ("no", "yes"),
        )  # fmt: skip
        made.append(Figure(chart, chart.title, f"{_share(values)} of steps and {by}s."))
    return made


def of_weights(read: Read, stride: int) -> Figure | None:
    """The means of the implicit weights, where the run has them."""
    if not read.run.contents.weights:
        return None
    table = implicit_weights(read.run)
    own = table[table["statistic"] == "mean"]
    names = [str(name) for name in own["weight"].unique()]
    drawn = inks(names)
    series = [
        _series(name, read, part["value"].to_numpy(dtype=float), drawn[name], stride)
        for name, part in ((n, own[own["weight"].astype(str) == n]) for n in names)
    ]
    chart = Lines("mean implicit weight", Scale.positive(own["value"]), series)
    return Figure(chart, chart.title)


_MARKED = [UNMARKED, "#00875f"]


def _map(table: pd.DataFrame, title: str, scale: Scale, scales: Scales, stride: int) -> Map:
    steps, blocks, values = grid(table)
    return Map(title, scale, steps[::stride], blocks, values[:, ::stride], scales.palette)


def _series(name: str, read: Read, values: Numbers, ink: Ink, stride: int) -> Series:
    shown = values[::stride]
    return Series(name, read.steps[::stride], [*map(float, shown)], ink.colour, _dashes(ink))


def _dashes(ink: Ink) -> list[float]:
    return [] if ink.dashes == "-" else [round(1.6 * float(length), 1) for length in ink.dashes[1]]


def _values(table: pd.DataFrame, quantity: str) -> Numbers:
    return table.loc[table["quantity"] == quantity, "value"].to_numpy(dtype=float)


def _share(values: Numbers) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.0%}" if len(known) else "undefined"


def _hex(colour: Iterable[float]) -> str:
    red, green, blue, *_ = (round(255 * share) for share in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _strides(several: Sequence[Read], curves: int) -> dict[str, int]:
    """Of each run every n-th step, so that a page has its room for curves."""
    most = max(FEWEST, POINTS // (len(several) * curves))
    return {read.name: -(-len(read.steps) // most) for read in several}


def stride_of_maps(read: Read, runs: int) -> int:
    """Of a run every n-th step, so that the maps of all runs of a page find room."""
    blocks = read.block_effects.groupby("effect", observed=True).size().sum() / max(
        1, len(read.steps)
    )
    most = max(FEWEST, int(NUMBERS / (runs * (1.2 * blocks + 4))))
    return -(-len(read.steps) // most)
