"""Long courses: what is drawn of more steps than a picture has pixels, so that no spike is lost."""

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes

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


def window_of_all(lines: Iterable[int]) -> int:
    """Over how many points all lines of a picture roll, from the number that each has.

    Of the shortest that has any: no line rolls over more than a hundredth of itself.

    >>> window_of_all([2000, 500, 0]), window_of_all([])
    (5, 1)
    """
    return window(min(filter(None, lines), default=0))


def rolling_median(course: Any, over: int) -> Any:
    """The median of so many steps about each, of a series or of columns; undefined where these are.

    >>> import pandas as pd
    >>> rolling_median(pd.Series([1.0, 9.0, 2.0, 3.0, float("nan")]), 3).tolist()
    [5.0, 2.0, 3.0, 2.5, nan]
    """
    if over == 1:
        return course
    return course.rolling(over, center=True, min_periods=1).median().where(course.notna())


def rolling_rate(course: Any, over: int) -> Any:
    """The mean of so many steps about each, of zeros and ones; undefined where these are."""
    return course.rolling(over, center=True, min_periods=1).mean().where(course.notna())


def each(steps: int, spans: int) -> str:
    """How many steps a span of so many has, in words.

    >>> each(400, 360), each(3000, 500)
    ('1 or 2 steps', 'about 6 steps')
    """
    return "1 or 2 steps" if steps < 2 * spans else f"about {steps // spans} steps"


def spans_of(ax: Axes) -> int:
    """How many spans axes have room for."""
    figure = ax.get_figure(root=True)
    width = figure.get_figwidth() if figure else 6.0
    return max(50, int(PER_INCH * width * ax.get_position().width))
