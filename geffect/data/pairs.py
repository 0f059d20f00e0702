"""Pairs: which forget and retain items meet in training, and the batches that they make."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from geffect.batch import IGNORED

Item = Mapping[str, Any]
"""`input_ids`, `attention_mask`, `labels` of one sample, as lists or tensors of one length."""

PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


class Items(Protocol):
    """Map-style data: a list of items, a torch dataset, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Item: ...


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

    def __getitem__(self, places: Sequence[int]) -> dict[str, Item]:
        return {
            name: items[place]
            for (name, items), place in zip(self.sets.items(), places, strict=True)
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many items each set has."""
        return tuple(map(len, self.sets.values()))


class Pairing(Sampler[tuple[int, ...]]):
    """Which items meet in an epoch: the leading set once, shuffled, and the others drawn beside it.

    A set is drawn without replacement, and anew once it is used up: one that is k times as large as
    the leading set is gone through once in k epochs. A function of `seed` and `epoch` alone, so
    that a resumed training meets the pairs that it would have met, on every process.

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


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """Items as a batch, padded on the right where nothing is scored; of pairs a batch of each set.

    >>> short = {"input_ids": [5], "attention_mask": [1], "labels": [5]}
    >>> long = {"input_ids": [6, 7], "attention_mask": [1, 1], "labels": [-100, 7]}
    >>> collate([{"forget": short, "retain": long}, {"forget": long, "retain": long}])["forget"]
    {'input_ids': tensor([[5, 0],
            [6, 7]]), 'attention_mask': tensor([[1, 0],
            [1, 1]]), 'labels': tensor([[   5, -100],
            [-100,    7]])}
    """
    if not PADDING.keys() & items[0].keys():
        return {name: _padded([item[name] for item in items]) for name in items[0]}
    return _padded(items)


def _padded(items: Sequence[Item]) -> dict[str, Tensor]:
    for item in items:
        if not (isinstance(item, Mapping) and item.keys() >= PADDING.keys()):
            found = f"{', '.join(item)}" if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(
                f"An item should have {', '.join(PADDING)}, or be a pair of such items by the "
                f"names forget and retain. Found {found}. Tokenize the data, with labels that are "
                f"{IGNORED} outside of the answer; or pass a `data_collator` of your own."
            )
    return {
        column: pad_sequence(
            [torch.as_tensor(item[column]) for item in items],
            batch_first=True,
            padding_value=value,
        )
        for column, value in PADDING.items()
    }
