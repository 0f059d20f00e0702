"""Long courses: what is drawn of more steps than a picture has pixels, so that no spike is lost."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LONG = 300
"""Steps from which on a course is drawn as its rolling median, before the band of all values."""

PER_INCH = 120
"""Spans of an inch, of each of which the lowest and the highest value are drawn."""


def window(steps: int) -> int:
    """Over how many steps the median rolls: an odd number, a hundredth of a long course.

    >>> window(40), window(500), window(2000)
    (1, 5, 21)
    """
    return 1 if steps < LONG else 2 * (steps // 200) + 1


def rolling_median(course: Any, over: int) -> Any:
    """The median of so many steps about each, of a series or of columns; undefined where these are.

    >>> import pandas as pd
    >>> rolling_median(pd.Series([1.0, 9.0, 2.0, 3.0, np.nan]), 3).tolist()
    [5.0, 2.0, 3.0, 2.5, nan]
    """
    if over == 1:
        return course
    return course.rolling(over, center=True, min_periods=1).median().where(course.notna())


def spans(steps: Floats, count: int) -> NDArray[np.int64]:
    """Where each of at most `count` spans of equal length begins among ascending steps.

    >>> spans(np.array([0.0, 1.0, 2.0, 10.0]), 2)
    array([0, 3])
    """
    ends = np.linspace(steps[0], steps[-1], count + 1)[:-1]
    return np.unique(np.searchsorted(steps, ends))


def envelope(steps: Floats, values: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    """Steps, and the lowest and the highest of the values, an array (step, course), in each span.

    >>> values = np.array([[0.0, 5.0], [1.0, np.nan], [2.0, -9.0], [3.0, 0.0]])
    >>> envelope(np.array([0.0, 1.0, 2.0, 3.0]), values, 2)
    (array([0., 2.]), array([ 0., -9.]), array([5., 3.]))
    """
    starts = spans(steps, count)
    low = np.fmin.reduceat(np.fmin.reduce(values, axis=1), starts)
    high = np.fmax.reduceat(np.fmax.reduce(values, axis=1), starts)
    return steps[starts], low, high


def thinned_course(steps: Floats, values: Floats, count: int) -> tuple[Floats, Floats]:
    """The course with the lowest and the highest value of each span alone, in their order.

    Gaps stay: of the undefined values of a span one is kept.

    >>> thinned_course(np.arange(6.0), np.array([0.0, 7.0, 1.0, 1.0, -3.0, 1.0]), 1)
    (array([0., 1., 4., 5.]), array([ 0.,  7., -3.,  1.]))
    """
    if len(steps) <= 4 * count:
        return steps, values
    starts = spans(steps, count)
    of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(steps)]))
    order = np.lexsort((values, of))  # undefined values last in each span
    defined = ~np.isnan(values[order])
    known = order[defined]
    first_of = np.flatnonzero(np.diff(of[known], prepend=-1))
    last_of = np.append(first_of[1:], len(known))[: len(first_of)] - 1
    gaps = order[~defined]
    kept = {0, len(steps) - 1, *known[first_of], *known[last_of]}
    kept |= {*gaps[np.flatnonzero(np.diff(of[gaps], prepend=-1))]}
    at = np.array(sorted(kept))
    return steps[at], values[at]
