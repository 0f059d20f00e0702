"""Long courses: what is drawn of more steps than a picture has pixels, so that no spike is lost."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LONG = 300
"""Steps from which on a course is drawn as its rolling median, before the band of all values."""

PER_INCH = 120
"""Spans of an inch, of each of which the lowest and the highest value are drawn."""


def window(steps: int, *, rates: bool = False) -> int:
    """Over how many steps a line rolls: an odd number, a hundredth of a long course.

    A rate is one of several steps: of a tenth of them, from 20 steps on.

    >>> window(40), window(500), window(2000), window(40, rates=True)
    (1, 5, 21, 5)
    """
    if rates:
        return 1 if steps < 20 else 2 * (steps // 20) + 1
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


def rolling_rate(course: Any, over: int) -> Any:
    """The mean of so many steps about each, of zeros and ones; undefined where these are."""
    return course.rolling(over, center=True, min_periods=1).mean().where(course.notna())


def spans_of(ax: Axes) -> int:
    """How many spans axes have room for."""
    figure = ax.get_figure(root=True)
    width = figure.get_figwidth() if figure else 6.0
    return max(50, int(PER_INCH * width * ax.get_position().width))


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


def largest_of_spans(steps: Floats, cells: Floats, count: int) -> tuple[Floats, Floats]:
    """The value of the largest size in each span, of cells (block, step): where a spike is, it is.

    >>> largest_of_spans(np.arange(4.0), np.array([[1.0, -9.0, np.nan, 2.0]]), 2)
    (array([0., 2.]), array([[-9.,  2.]]))
    """
    starts = spans(steps, count)
    low = np.fmin.reduceat(cells, starts, axis=1)
    high = np.fmax.reduceat(cells, starts, axis=1)
    return steps[starts], np.where(-low > high, low, high)


def rates_of_spans(steps: Floats, cells: Floats, count: int) -> tuple[Floats, Floats]:
    """The mean of what is defined in each span, of cells (block, step).

    >>> rates_of_spans(np.arange(4.0), np.array([[1.0, 0.0, np.nan, 1.0]]), 2)
    (array([0., 2.]), array([[0.5, 1. ]]))
    """
    starts = spans(steps, count)
    known = np.add.reduceat((~np.isnan(cells)).astype(float), starts, axis=1)
    total = np.add.reduceat(np.nan_to_num(cells), starts, axis=1)
    return steps[starts], np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)
