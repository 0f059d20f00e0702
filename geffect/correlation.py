"""The correlation of two columns of numbers, and how certain it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ENOUGH = 8
"""Pairs below which a rank correlation says too little."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of `count` pairs with the interval of Fisher's z; NaN where it is undefined."""

    r: float
    low: float
    high: float
    count: int


def correlation(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Correlation:
    """Pearson's r, and the interval tanh(atanh r -+ q / sqrt(n - 3)) at this level.

    - `first`, `second`: as many finite numbers each. With less than 4 there is no interval, and
      where all numbers of one are the same no r.

    >>> found = correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    >>> round(found.r, 3), round(found.low, 3), round(found.high, 3)
    (0.8, -0.28, 0.986)
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if x.ndim != 1 or x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(
            "`first` and `second` should be as many finite numbers each. Found shapes "
            f"{x.shape} and {y.shape}, or numbers that are not finite. Leave those pairs out."
        )
    nothing = float("nan")
    if len(x) < 2 or _is_constant(x) or _is_constant(y):
        return Correlation(nothing, nothing, nothing, len(x))
    from scipy import stats  # takes long to load

    found = stats.pearsonr(x, y)
    r = float(found.statistic)
    if len(x) < 4 or abs(r) == 1.0:
        return Correlation(r, nothing, nothing, len(x))
    low, high = found.confidence_interval(level)
    return Correlation(r, float(low), float(high), len(x))


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The rank of each number from 0, equal ones sharing the mean of theirs.

    >>> ranks([10.0, 30.0, 10.0]).tolist()
    [0.5, 2.0, 0.5]
    """
    from scipy import stats  # takes long to load

    return np.asarray(stats.rankdata(values) - 1)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64], least: int = ENOUGH) -> float:
    """Spearman's correlation of at least so many pairs; NaN for fewer, and where one is constant.

    >>> round(rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0, 5.0]), 3), 12)
    1.0
    """
    return correlation(ranks(x), ranks(y)).r if len(x) >= least else float("nan")


def fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Spearman's correlation, and the slope of y over x by least squares; NaN where undefined.

    >>> fit(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    (nan, 2.0)
    """
    if len(x) < 2:
        return float("nan"), float("nan")
    spread = x - x.mean()
    squares = float(spread @ spread)
    known = bool(squares) and bool(np.isfinite(y).all())
    # From the first one on, so that numbers that are all the same have a slope of 0.
    slope = float(spread @ (y - y[0])) / squares if known else float("nan")
    return rank_correlation(x, y), slope
