"""Schedules: which steps of a run are captured. Each says yes or no to the number of a step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class _Every:
    """The multiples of `k`; shown as it was called for."""

    k: int

    def __call__(self, step: int) -> bool:
        return step % self.k == 0

    def __repr__(self) -> str:
        return f"every({self.k})"


@dataclass(frozen=True)
class _At:
    """A few steps; shown as they were called for."""

    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"at({', '.join(map(str, sorted(self.steps)))})"


def every(k: int) -> Schedule:
    """The steps 0, k, 2k, ...

    >>> every(4), [step for step in range(10) if every(4)(step)]
    (every(4), [0, 4, 8])
    """
    if k < 1:
        raise ValueError(f"`k` should be at least 1. Found `k = {k}`. Pass 1 for each step.")
    return _Every(k)


EACH = every(1)


def at(*steps: int) -> Schedule:
    """These steps and no other.

    >>> at(7, 0), [step for step in range(10) if at(0, 7)(step)]
    (at(0, 7), [0, 7])
    """
    return _At(frozenset(steps))


def logspaced(n: int, last: int) -> Schedule:
    """Step 0 and up to `n` more steps, at equal ratios from 1 to `last`: dense at the start.

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


def as_ranges(steps: Iterable[int]) -> list[list[int]]:
    """Steps that grow, in ranges: the first step of each, its last one, and how far they are apart.

    >>> as_ranges([0, 5, 10, 15, 17]), as_ranges([3]), as_ranges([])
    ([[0, 15, 5], [17, 17, 1]], [[3, 3, 1]], [])
    """
    ranges: list[list[int]] = []
    for step in dict.fromkeys(steps):
        first, last, apart = ranges[-1] if ranges else (step, step, 0)
        if ranges and (first == last or step - last == apart):
            ranges[-1] = [first, step, step - last]
        else:
            ranges.append([step, step, 1])
    return ranges
