"""Retain data beside the data of a Trainer: which of its batches belong to a step."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import islice

import torch

from geffect.batch import Batch
from geffect.risk import RiskSet, as_batches, check_data, noting_risk
from geffect.sources import RETAIN


class RetainBatches:
    """Batches, gone through again and again as one endless row.

    The number of a batch in the row says which one it is, so that a training that is resumed sees
    what it would have seen: each pass through a loader that shuffles begins with a seed of its own.
    That draws random numbers, and is for where these are kept, as in `risk_gradient`.

    >>> one, two = ({"labels": torch.full((1, 2), i)} for i in (1, 2))
    >>> [int(batch["labels"][0, 0]) for batch in RetainBatches([one, two]).window(3, count=2)]
    [2, 1]
    """

    def __init__(self, batches: RiskSet) -> None:
        with noting_risk(RETAIN):
            self._batches = as_batches(batches)
            check_data(batches)
        self._row: Iterator[Batch] = iter(())
        self._next = -1

    def window(self, first: int, *, count: int) -> "Window":
        """`count` batches from number `first` of the row, which begins with 0."""
        return Window(self, first, count)

    def read(self, first: int, count: int) -> Iterator[Batch]:
        if first != self._next:
            self._row = self._from(first)
        self._next = -1  # a window that is left in its midst is begun anew
        yield from islice(self._row, count)
        self._next = first + count

    def _from(self, first: int) -> Iterator[Batch]:
        batches = self._batches
        length = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
        passed, index = divmod(first, length)
        while True:
            torch.manual_seed(passed)
            for owner in (batches, getattr(batches, "sampler", None)):
                if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                    own.manual_seed(passed)
            yield from islice(batches, index, None)
            passed, index = passed + 1, 0


@dataclass(frozen=True)
class Window:
    """Some batches of the row, read when they are gone through."""

    row: RetainBatches
    first: int
    count: int

    def __iter__(self) -> Iterator[Batch]:
        return self.row.read(self.first, self.count)
