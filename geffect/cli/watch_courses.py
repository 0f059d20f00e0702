"""Courses: scores of a run over its steps, those of a part of them joined to the ones before."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """A score over the steps: an array (step, block)."""

    name: str
    blocks: tuple[str, ...]
    values: Floats
    says: str = ""  # what the values are, with the unit
    unit: str = ""

    @property
    def last(self) -> Floats:
        """The values of the last step."""
        last: Floats = self.values[-1]
        return last

    @property
    def rates(self) -> Floats:
        """For each step the mean over the blocks where it is known; NaN where it is in none."""
        known = ~np.isnan(self.values)
        counts = known.sum(axis=1)
        sums = np.where(counts, np.nansum(self.values, axis=1), np.nan)
        rates: Floats = sums / np.maximum(counts, 1)
        return rates

    @property
    def known(self) -> int:
        """In how many blocks and steps the value is known."""
        return int((~np.isnan(self.values)).sum())

    @property
    def rate(self) -> float:
        """The mean over all blocks and steps where the value is known."""
        return float(np.nansum(self.values) / self.known) if self.known else math.nan


def bucketed(values: Floats, most: int) -> Floats:
    """At most so many values: of steps that share a place the mean of those that are known.

    >>> bucketed(np.array([1.0, 3.0, float("nan"), 7.0]), 2)
    array([2., 7.])
    """
    if len(values) <= most:
        return values
    starts = np.arange(most) * len(values) // most
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    # Shares first: the sum of large values may be too large for a number.
    shares = np.where(known, values, 0.0) / np.repeat(
        np.maximum(counts, 1), np.diff(starts, append=len(values))
    )
    return np.where(counts > 0, np.add.reduceat(shares, starts), np.nan)


def measured(run: "Run", by: str, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Course]]]:
    """The courses of each kind."""
    yield "effects", _effects(run, by, notes)
    yield "totals", _effects(run, "model", [])
    yield "rates", _rates(run, notes)
    losses = {name: values[:, np.newaxis] for name, values in run.losses().items()}
    yield "losses", {name: Course(name, ("loss",), values) for name, values in losses.items()}
    seconds = run.column("wall_seconds")[:, np.newaxis]
    yield "seconds", {"seconds": Course("seconds", ("seconds",), seconds)}


def joined(
    old: Mapping[str, Course], new: Mapping[str, Course], same: int, count: int
) -> dict[str, Course]:
    """The steps that are as they were, and those that are new; NaN where one has none."""
    found = {}
    for name, one in {**old, **new}.items() if same else new.items():
        wide = len(one.blocks)
        before = old[name].values[:same] if name in old else np.full((same, wide), np.nan)
        after = new[name].values if name in new else np.full((count, wide), np.nan)
        found[name] = replace(one, values=np.concatenate([before, after]))
    return found


def _effects(run: "Run", by: str, notes: list[str]) -> dict[str, Course]:
    """G-effects; where forget and retain are not both there, cosines with the risks there are."""
    from geffect.analysis import cosine, g_effect
    from geffect.sources import FORGET, OBJECTIVE, RETAIN, is_risk

    if {OBJECTIVE, FORGET, RETAIN} <= {*run.sources}:
        table = g_effect(run, by=by)
        parts = table.groupby("effect", observed=True, sort=False)
        return {str(name): _course(str(name), part, by, len(run.steps)) for name, part in parts}
    risks = [source for source in run.sources if is_risk(source)]
    if OBJECTIVE not in run.sources or not risks:
        notes.append(f"No G-effects: the run has {', '.join(run.sources)}, not objective and risk.")
        return {}
    notes.append(f"Cosines in place of G-effects: the run has {', '.join(run.sources)}.")
    tables = {risk: cosine(run, OBJECTIVE, risk, by=by) for risk in risks}
    return {risk: _course(risk, table, by, len(run.steps)) for risk, table in tables.items()}


def _rates(run: "Run", notes: list[str]) -> dict[str, Course]:
    """Conflict of objective and retain, and violations by the update, as 0 or 1."""
    from geffect.analysis import conflict, violation
    from geffect.sources import OBJECTIVE, RETAIN

    found = {}
    if {OBJECTIVE, RETAIN} <= {*run.sources}:
        found["conflict"] = _course("conflict", conflict(run), None, len(run.steps))
    if run.contents.blocks:
        for name, table in _tried(lambda: violation(run), "No violations", notes):
            parts = table.groupby("against", observed=True) if "against" in table else [("", table)]
            for against, part in parts:
                full = f"{name} {against}".strip()
                found[full] = _course(full, part, None, len(run.steps))
    return found


def _tried(
    analyzer: Callable[[], "pd.DataFrame"], missing: str, notes: list[str]
) -> Iterator[tuple[str, "pd.DataFrame"]]:
    try:
        yield "violation", analyzer()
    except ValueError as error:  # the run does not hold what that takes
        notes.append(f"{missing}: {error}")


def _course(name: str, table: "pd.DataFrame", by: str | None, steps: int) -> Course:
    """The values of a score table, which has a row for each block of each step."""
    from geffect.scores import blocks_of, score_of

    values = table["value"].to_numpy(dtype=float).reshape(steps, -1)
    blocks = table[by if by in table else blocks_of(table)].iloc[: values.shape[1]]
    score = score_of(table)
    return Course(name, tuple(map(str, blocks)), values, score.full, score.unit)
