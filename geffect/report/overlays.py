"""All runs of a report in the same panel, over the steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from geffect.pages import Lines, Scale
from geffect.plots.inks import DOTTED, SOLID, SPARE, Dashes, Ink
from geffect.scores import score_of

from .charts import COSINES, FEWEST, Figure, series_of
from .read import Numbers, Read

POINTS = 120_000
"""So many numbers all curves of the overlays have, at most: then the ends of spans are shown."""

TURNS: Sequence[Dashes] = (SOLID, (0, (5, 2)), DOTTED, (0, (8, 2, 1, 2)))
"""The dashes of the runs whose colours come again."""


@dataclass(frozen=True)
class Course:
    """What is compared: its name, its values of a run, their scale, and what is good."""

    title: str
    of: Callable[[Read], Numbers]
    scaled: Callable[[Numbers], Scale]
    remark: str


def overlays(several: Sequence[Read]) -> list[Figure]:
    """Risks, G-effects and cosine of the model, and its conflicts; a panel for each unit."""
    courses = [*_courses(several)]
    drawn = dict(zip((read.name for read in several), run_inks(len(several)), strict=True))
    most = max(FEWEST, POINTS // (len(several) * len(courses)))
    across = "row" if any(read.repeats for read in several) else "step"
    made = []
    for course in courses:
        values = {read.name: course.of(read) for read in several}
        known = [those for those in values.values() if np.isfinite(those).any()]
        if known:
            series = [
                series_of(read, values[read.name], drawn[read.name], most, read.name)
                for read in several
                if len(values[read.name])
            ]
            chart = Lines(course.title, course.scaled(np.concatenate(known)), series, across)
            made.append(Figure(chart, course.title, course.remark))
    return made


def run_inks(count: int) -> list[Ink]:
    """An ink for each of so many runs.

    >>> len({(ink.colour, ink.dashes) for ink in run_inks(20)})
    20
    """
    spare = len(SPARE)
    return [
        Ink(SPARE[i % spare].colour, TURNS[i // spare % len(TURNS)]) if count > spare else SPARE[i]
        for i in range(count)
    ]


def _courses(several: Sequence[Read]) -> Iterator[Course]:
    for name, good in (("forget", "High means forgotten."), ("retain", "Low means kept.")):
        yield Course(f"{name} risk (nats)", _loss(name), Scale.positive, good)
    units = dict.fromkeys(unit_of(read) for read in several)
    for name, good in (("unlearning", "Negative is good."), ("retaining", "Negative is damage.")):
        for unit in units:
            yield Course(f"{name} G-effect ({unit})", _effect(name, unit), _signed, good)
    yield Course(
        "cosine of objective and retain gradient",
        lambda read: read.cosine["value"].to_numpy(dtype=float),
        lambda values: COSINES,
        "Below zero they are in conflict.",
    )
    yield Course(
        "conflict, share of blocks",
        _shares,
        lambda values: Scale("linear", -0.02, 1.02),
        "1: all blocks of a step are in conflict.",
    )


def unit_of(read: Read) -> str:
    """The unit of the G-effects of the objective."""
    effects = read.effects
    return score_of(effects[effects["effect"] == "unlearning"]).unit


def _loss(name: str) -> Callable[[Read], Numbers]:
    return lambda read: read.loss(name)


def _effect(name: str, unit: str) -> Callable[[Read], Numbers]:
    return lambda read: read.effect(name) if unit_of(read) == unit else np.array([])


def _signed(values: Numbers) -> Scale:
    return Scale.signed(values, "symlog")


def _shares(read: Read) -> Numbers:
    return read.conflicts.groupby("step")["value"].mean().to_numpy(dtype=float)
