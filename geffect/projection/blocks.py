"""Which parameters share a constraint, and the Gram matrices of each such block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Self

import torch
from torch import Tensor

from geffect import distributed, dots

from .spaces import Where

Vectors = list[Tensor | None]


@dataclass(frozen=True)
class Blocks:
    """Which parameters share a constraint: the names of the blocks, and the one of each parameter.

    >>> Blocks.of(["head", "layer 0", "head"])
    Blocks(names=('head', 'layer 0'), index=(0, 1, 0))
    """

    names: tuple[str, ...]
    index: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Self:
        """Parameters with one label are one block."""
        names = tuple(dict.fromkeys(labels))
        return cls(names, tuple(map(names.index, labels)))


class GramAccumulator:
    """Gram matrices that are taken one parameter at a time, and added up when they are asked for.

    Adding up is one reduction where parameters are sharded, on all processes at once.
    """

    def __init__(
        self,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        size: int,
        *,
        quick: bool = True,
    ) -> None:
        self._blocks, self._parameters = blocks, parameters
        self._gram = dots.quick_gram if quick else dots.gram
        self._matrices: list[dict[int, Tensor]] = [{} for _ in parameters]
        self._nothing = torch.zeros(size, size, dtype=torch.float64)

    def knows(self, i: int, part: int) -> bool:
        """Whether a part of a parameter, by its number, is in it."""
        return part in self._matrices[i]

    def add(self, i: int, part: int, vectors: Vectors, *, count: Tensor | None = None) -> None:
        """Add the inner products of a part of a parameter, and a number that is summed up too."""
        products = self._gram(vectors if count is None else [*vectors, None])
        if count is not None:
            products[-1, -1] = count
        self._matrices[i][part] = products

    def put(self, i: int, products: Tensor) -> None:
        """Add the inner products of all of a parameter, with the number."""
        self._matrices[i][0] = products

    def by_block(self) -> Tensor:
        """The Gram matrices `Float64[block, k, k]`, on the CPU."""
        over = [distributed.holders(parameter) for parameter in self._parameters]
        summed_parts = [reduce(add, m.values()) if m else self._nothing for m in self._matrices]
        table = dots.gathered(summed_parts, over)
        summed = table.new_zeros(len(self._blocks.names), *table.shape[1:])
        return summed.index_add(0, torch.tensor(self._blocks.index), table)


def held(vectors: Vectors) -> Vectors:
    """What this process holds of the tensors."""
    return [None if v is None else distributed.local(v) for v in vectors]


def parts(vectors: Vectors, where: Where) -> Vectors:
    """The same part of each tensor."""
    return [None if v is None else v[where] for v in vectors]


def block_names(blocks: Blocks, sets: Sequence[str]) -> tuple[str, ...]:
    """What a report has a number for: the blocks, or each block and retain set.

    >>> block_names(Blocks.of(["model"]), ["retain", "world"])
    ('model, retain', 'model, world')
    """
    if len(sets) == 1:
        return blocks.names
    return tuple(f"{block}, {name}" for block in blocks.names for name in sets)
