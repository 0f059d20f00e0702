"""Spans of steps: what is shown of more steps than there are pixels, so that no peak is lost."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
