"""The correlation of two columns of numbers, and how certain it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


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
    # To the same size first: squares of very small or large numbers are none.
    a, b = (v / np.abs(v).max() for v in (x - x.mean(), y - y.mean()))
    r = float(np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1.0, 1.0))
    if len(x) < 4 or abs(r) == 1.0:
        return Correlation(r, nothing, nothing, len(x))
    half = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(len(x) - 3)
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), len(x))


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The rank of each number from 0, equal ones sharing the mean of theirs.

    >>> ranks([10.0, 30.0, 10.0]).tolist()
    [0.5, 2.0, 0.5]
    """
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = counts.cumsum() - 1
    shared: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return shared
