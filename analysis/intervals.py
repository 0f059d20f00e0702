"""Intervals: how certain a score is, from the batches that its steps were measured on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.store import Run

from .base import check_run

ENOUGH_ROWS = 8
"""Rows below which a step has no interval: how much so few vary says little."""

_AT_ONCE = 2**26
"""How many bytes of rows are drawn at a time."""


def intervals(
    score: Callable[..., pd.DataFrame],
    run: Run,
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """The table of `score(run, **how)` with `rows`, `low` and `high`: a bootstrap over batches.

    In every replicate the rows of each step are drawn anew with replacement, and the score is
    computed from their mean. `low` and `high` are percentiles of its values. Means of n rows that
    are drawn vary by less than those of new rows do, and the variance is itself an estimate: so the
    percentiles are those of the standard normal distribution at sqrt(n / (n - 1)) times the
    quantile of Student's t with n - 1 degrees of freedom (the expanded percentile interval,
    arXiv 1411.5279). NaN where a step has fewer than 8 rows, or where the score is undefined in a
    replicate. An estimator's bias is in all replicates alike, and so in no interval.

    Steps of several rows come from `geffect.replay`.

    >>> from geffect.analysis import g_effect
    >>> table = intervals(g_effect, example_run(), by="model", replicates=10)
    >>> table[["effect", "value", "rows", "low", "high"]]
           effect  value  rows  low  high
    0  unlearning   -4.0     1  NaN   NaN
    1   retaining   -1.0     1  NaN   NaN
    """
    check_run(run)
    if not (0 < level < 1 and replicates > 0):
        raise ValueError(
            "`level` should be between 0 and 1, and `replicates` at least 1. Found "
            f"`level = {level}` and `replicates = {replicates}`. Pass, say, level=0.95."
        )
    rng = np.random.default_rng(seed)
    held = _held(run)
    with np.errstate(invalid="ignore"):  # an estimate of a squared norm may be negative
        table = score(held, **how)
        at_once = _AT_ONCE // held.nbytes or 1 if _is_of_each_step(score, held, how, table) else 1
        drawn = [held.resampled(rng).drawn for _ in range(replicates)]
        values = [
            _values(score, held, drawn[start : start + at_once], how)
            for start in range(0, replicates, at_once)
        ]
    rows = table["step"].map(pd.Series(run.rows, index=run.steps).groupby(level=0).min())
    bounds = np.full((2, len(table)), np.nan)
    for count in rows[rows >= ENOUGH_ROWS].unique():
        share, own = share_below(level, count), (rows == count).to_numpy()
        bounds[:, own] = np.quantile(np.vstack(values)[:, own], [share, 1 - share], axis=0)
    return table.assign(rows=rows, low=bounds[0], high=bounds[1])


def share_below(level: float, rows: int) -> float:
    """What share of the replicates lies below an interval of means of so many rows."""
    from scipy.special import ndtr, stdtrit  # takes long to load

    freedom = rows - 1
    t = stdtrit(freedom, (1 + level) / 2)  # the quantile of Student's t
    return float(ndtr(-t * np.sqrt(rows / freedom)))


@dataclass(frozen=True, repr=False)
class _Held(Run):
    """A run whose rows are read from the file once, for it and all that is drawn from it."""

    origin: Run
    arrays: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = field(default_factory=dict)

    def read(self, name: str, *entry: int) -> NDArray[Any]:
        if (name, entry) not in self.arrays:
            self.arrays[name, entry] = self.origin.read(name, *entry)
        return self.arrays[name, entry][self.drawn]

    @property
    def nbytes(self) -> int:
        """The bytes of what has been read."""
        return sum(array.nbytes for array in self.arrays.values()) or 1


def _held(run: Run) -> _Held:
    given = {f.name: getattr(run, f.name) for f in fields(Run)}
    return _Held(**given | {"drawn": np.arange(len(run.drawn)), "origin": run})


def _values(
    score: Callable[..., pd.DataFrame],
    held: _Held,
    drawn: Sequence[NDArray[np.int64]],
    how: dict[str, Any],
) -> NDArray[np.float64]:
    """The values of the score, one line for each of the draws."""
    count, steps = len(drawn), len(held.steps)
    if count == 1:
        return score(replace(held, drawn=drawn[0]), **how)["value"].to_numpy()[np.newaxis]
    table = score(_one_after_the_other(held, drawn), **how)
    by_draw = (table["step"] // steps).argsort(kind="stable")
    return table["value"].to_numpy()[by_draw].reshape(count, -1)


def _one_after_the_other(held: _Held, drawn: Sequence[NDArray[np.int64]]) -> _Held:
    """All draws as the steps of one run: a table costs far more than the numbers in it."""
    return replace(
        held,
        steps=np.arange(len(drawn) * len(held.steps)),
        rows=np.tile(held.rows, len(drawn)),
        drawn=np.concatenate(drawn),
    )


def _is_of_each_step(
    score: Callable[..., pd.DataFrame], held: _Held, how: dict[str, Any], table: pd.DataFrame
) -> bool:
    """Whether the score of a step knows nothing of the others, so that steps can be added."""
    twice = score(_one_after_the_other(held, [held.drawn] * 2), **how)
    if len(twice) != 2 * len(table):
        return False
    both = _values(score, held, [held.drawn] * 2, how)
    return all(np.array_equal(values, table["value"], equal_nan=True) for values in both)
