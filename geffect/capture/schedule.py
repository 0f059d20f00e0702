"""Schedules: which steps of a run are captured. Each says yes or no to the number of a step."""

from collections.abc import Callable

Schedule = Callable[[int], bool]


def every(k: int) -> Schedule:
    """The steps 0, k, 2k, ...

    >>> [step for step in range(10) if every(4)(step)]
    [0, 4, 8]
    """
    if k < 1:
        raise ValueError(f"`k` should be at least 1. Found `k = {k}`. Pass 1 for each step.")
    return lambda step: step % k == 0


EACH = every(1)


def at(*steps: int) -> Schedule:
    """These steps and no other.

    >>> [step for step in range(10) if at(0, 7)(step)]
    [0, 7]
    """
    chosen = frozenset(steps)
    return lambda step: step in chosen


def logspaced(n: int, last: int) -> Schedule:
    """Step 0 and up to n steps more at equal ratios from 1 to `last`, rounded: dense at the start.

    An unlearning run changes most in its first steps.

    >>> [step for step in range(200) if logspaced(8, 100)(step)]
    [0, 1, 2, 4, 7, 14, 27, 52, 100]
    """
    if n < 2 or last < 1:
        raise ValueError(
            f"`n` should be at least 2 and `last` at least 1. Found `n = {n}, last = {last}`. "
            "Pass how many steps to capture and the last of them."
        )
    return at(0, *(round(last ** (i / (n - 1))) for i in range(n)))
