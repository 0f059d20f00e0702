"""A rule for each coordinate by itself, which changes a space in place and tells what it did."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect import dots
from geffect.gradients import Rectification
from geffect.gram import inner, norm

from . import fused
from .blocks import Blocks, GramAccumulator, Vectors, held, parts
from .elementwise import Elementwise
from .reports import reported
from .spaces import Space


class Coordinates:
    """A rule for every coordinate by itself, one parameter after the other.

    It asks no other process anything; `report` does, on all of them at once.
    """

    def __init__(
        self,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        sets: Sequence[str],
        rule: Elementwise | None,
        *,
        count: int,
    ) -> None:
        self._blocks, self._sets, self._rule = blocks, sets, rule
        # u, x and the averages, and how many coordinates were changed.
        self._tally = GramAccumulator(blocks, parameters, 3 + count)

    def change(self, space: Space, i: int, averages: Vectors, mask: Tensor | None) -> None:
        """Change the direction of one parameter."""
        local = held(averages)
        kernel = fused.elementwise(space, i, local, mask, self._rule)
        if kernel is not None:
            if not self._tally.knows(i, 0):
                found = [0, 1, *(2 + j for j, r in enumerate(local) if r is not None)]
                count = 2 + len(local)
                products = dots.placed(kernel.gram(), [*found, count], count + 1)
                self._tally.put(i, products)
            space.change(i, kernel.write)
            return
        for part, where in enumerate(space.parts(i)):
            u, retain = space.direction(i, where), parts(local, where)
            present = [r for r in retain if r is not None]
            x = u if self._rule is None or not present else self._rule(u, present)
            if mask is not None:
                x = x * mask[where]
            changed = torch.ne(x, u, out=torch.empty_like(u))
            if not self._tally.knows(i, part):  # from before an interrupt, where u was as it was
                self._tally.add(i, part, [u, x, *retain], count=changed.sum())
            space.replace(i, where, x, changed)

    def report(self) -> Rectification:
        """What was done."""
        K = self._tally.by_block()
        u, x, averages, count = 0, 1, slice(2, 2 + len(self._sets)), -1
        seen = [u, *range(2, 2 + len(self._sets))]
        return reported(
            self._blocks,
            self._sets,
            K[:, seen][:, :, seen],
            inner_after=K[:, x, averages],
            norm_after=norm(K, x),
            coefficient=torch.full((len(K), len(self._sets)), torch.nan),
            fired=inner(K, count, count) > 0,
            unmet=torch.zeros(len(K), dtype=torch.bool),
        )
