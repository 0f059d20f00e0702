"""What a bootstrap draws: how often each item, those of one subject together."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
"""So many times a bootstrap draws."""

KEPT = 2**21
"""What was drawn is kept for the next call where it has no more numbers, 16 MiB."""


def numbered(subjects: Sequence[Hashable]) -> NDArray[np.int64]:
    """The number of its subject for each item, from 0 in the order in which they come.

    >>> numbered(["b", "a", "b"])
    array([0, 1, 0])
    """
    number = {subject: index for index, subject in enumerate(dict.fromkeys(subjects))}
    return np.array([number[subject] for subject in subjects], dtype=np.int64)


def resamples(
    units: NDArray[np.int64], draws: int = DRAWS, seed: int | np.random.Generator = 0
) -> NDArray[np.float64]:
    """How often each item is in each draw, `Float64[draw, item]`, the same for the same units.

    So the values of several models on the same items are drawn together. The array is read-only:
    of a few items, and a number as seed, it is kept for the next call.

    - `units`: for each item the number, from 0, of what is drawn as a whole, such as its subject.
    - `seed`: or a generator, which goes on from one set to the next.

    >>> resamples(np.array([0, 0, 1]), draws=2).sum(axis=1) > 0
    array([ True,  True])
    """
    of = units.astype(np.int64).tobytes()
    if isinstance(seed, int) and draws * len(units) <= KEPT:
        return _kept(of, draws, seed)
    return _drawn(of, draws, seed)


@lru_cache(maxsize=2)
def _kept(units: bytes, draws: int, seed: int) -> NDArray[np.float64]:
    return _drawn(units, draws, seed)


def _drawn(units: bytes, draws: int, seed: int | np.random.Generator) -> NDArray[np.float64]:
    of = np.frombuffer(units, dtype=np.int64)
    count = int(of.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    found = drawn[:, of].astype(np.float64)
    found.flags.writeable = False
    return found


def check_bootstrap(level: float, replicates: int) -> None:
    """Refuse an interval of no level, and one of no draws."""
    if not (0 < level < 1 and replicates > 0):
        raise ValueError(
            "`level` should be between 0 and 1, and `replicates` at least 1. Found "
            f"`level = {level}` and `replicates = {replicates}`. Pass, say, level=0.95."
        )
