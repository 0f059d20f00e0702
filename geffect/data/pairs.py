"""Pairs: which forget and retain items meet in training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from .collate import Item


class Items(Protocol):
    """Map-style data: a list of items, a torch dataset, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


class Pairs(Dataset[dict[str, Item]]):
    """Items of several sets side by side; the first of the sets leads the epoch.

    >>> pairs = Pairs({"forget": ["f0", "f1"], "retain": ["r0", "r1", "r2"]})
    >>> pairs[1, 2], len(pairs)
    ({'forget': 'f1', 'retain': 'r2'}, 2)
    """

    def __init__(self, sets: Mapping[str, Items]) -> None:
        empty = [name for name, items in sets.items() if not len(items)]
        if empty:
            raise ValueError(
                f"A set of items should have at least one. Found none in {', '.join(empty)}. See "
                "whether its rows were filtered to nothing."
            )
        self.sets = dict(sets)

    def __len__(self) -> int:
        return self.sizes[0]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Item]:
        return {
            name: items[index]
            for (name, items), index in zip(self.sets.items(), indices, strict=True)
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many items each set has."""
        return tuple(map(len, self.sets.values()))


class Pairing(Sampler[tuple[int, ...]]):
    """Which items meet in an epoch: the leading set once, shuffled, and the others drawn beside it.

    - `sizes`: how many items each set has; the first leads.
    - `seed`, and the attribute `epoch`: these alone say which pairs there are. So a resumed
      training meets the pairs that it would have met, on every process.

    A set is drawn without replacement, and anew once it is used up. One that is k times as large as
    the leading set is gone through once in k epochs.

    >>> pairing = Pairing((2, 4), seed=0)
    >>> first = list(pairing)
    >>> pairing.epoch = 1
    >>> sorted(retain for _, retain in [*first, *pairing])
    [0, 1, 2, 3]
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.sizes, self.seed, self.epoch = tuple(sizes), seed, 0

    def __len__(self) -> int:
        return self.sizes[0]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return zip(*map(self._drawn, range(len(self.sizes))), strict=True)

    def _drawn(self, which: int) -> list[int]:
        size, count = self.sizes[which], len(self)
        first, start = divmod(self.epoch * count, size)
        rounds = [
            np.random.default_rng([self.seed, which, first + i]).permutation(size)
            for i in range((start + count - 1) // size + 1)
        ]
        drawn: list[int] = np.concatenate(rounds)[start : start + count].tolist()
        return drawn
