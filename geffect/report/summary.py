"""The table of the runs of a report: a row for each, a column for what they are compared by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from geffect.numbers import percent

from .read import Numbers, Read, objective_of, rectifier_of

UNDEFINED = "undefined"


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading, the word that defines it, how a value is written."""

    heading: str
    word: str
    of: Callable[[Read], float]
    written: Callable[[float], str] = "{:.4g}".format


@dataclass(frozen=True)
class Cell:
    """A value as it is shown, and as it is sorted."""

    text: str
    value: str


@dataclass(frozen=True)
class Row:
    """A run: what it is, and its values."""

    name: str
    anchor: str
    objective: str
    rectifier: str
    cells: Sequence[Cell]


def last(values: Numbers) -> float:
    """The last value that is a number; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if len(known) else np.nan


def mean(values: Numbers) -> float:
    """The mean over the values that are numbers; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def conflict_rate(read: Read) -> float:
    return mean(read.conflicts["value"].to_numpy(dtype=float))


def violation_rate(read: Read) -> float:
    found = read.violations
    return np.nan if found is None else mean(found["value"].to_numpy(dtype=float))


def _loss(name: str) -> Callable[[Read], float]:
    return lambda read: last(read.loss(name))


def _effect(name: str, summed: Callable[[Numbers], float]) -> Callable[[Read], float]:
    return lambda read: summed(read.effect(name))


def in_percent(rate: float) -> str:
    """A rate in per cent, with a decimal."""
    return percent(rate, ".1f")


COLUMNS = (
    Column("steps", "step", lambda read: len(read.steps), "{:.0f}".format),
    Column("forget loss, last", "risk", _loss("forget")),
    Column("retain loss, last", "risk", _loss("retain")),
    Column("unlearning, last", "unlearning G-effect", _effect("unlearning", last)),
    Column("unlearning, mean", "unlearning G-effect", _effect("unlearning", mean)),
    Column("retaining, last", "retaining G-effect", _effect("retaining", last)),
    Column("retaining, mean", "retaining G-effect", _effect("retaining", mean)),
    Column("cosine, mean", "cosine", lambda read: mean(read.cosine["value"].to_numpy(dtype=float))),
    Column("conflict rate", "conflict", conflict_rate, in_percent),
    Column("violation rate", "constraint violation", violation_rate, in_percent),
)


def rows(several: Sequence[Read]) -> list[Row]:
    """The table, in the order in which the runs were given."""
    return [
        Row(
            read.name,
            read.anchor,
            objective_of(read.run.manifest),
            rectifier_of(read.run.manifest),
            [_cell(column, column.of(read)) for column in COLUMNS],
        )
        for read in several
    ]


def _cell(column: Column, value: float) -> Cell:
    if isnan(value):
        return Cell(UNDEFINED, UNDEFINED)
    return Cell(column.written(value), repr(float(value)))
