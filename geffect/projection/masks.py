"""How much of a model a mask keeps at a step, and how much of that the mask before kept too."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .blocks import Blocks, GramAccumulator

Mask = Callable[[int], Tensor | None]
"""The coordinates of a parameter that may move; None where it takes no part."""


class Masks:
    """Counts the masks of one step, parameter by parameter, as they are asked for.

    - `before`: the masks of the step before by the index of the parameter; none at the first step.

    Of each block: how many coordinates the mask is `among`, how many are `selected`, how many of
    these the mask before had too (`again`), and how many are in either of both. |a & b| / |a | b|
    of two masks is their Jaccard overlap. Sums over blocks are those of larger blocks.

    >>> before, own = {0: torch.tensor([True, True, False])}, torch.tensor([False, True, True])
    >>> masks = Masks(Blocks.of(["model"]), [torch.zeros(3)], before)
    >>> masks.of(lambda i: own)(0) is own
    True
    >>> masks.counts()
    {'among': [3.0], 'selected': [2.0], 'again': [1.0], 'either': [3.0]}
    """

    COUNTS = ("among", "selected", "again", "either")

    def __init__(
        self, blocks: Blocks, parameters: Sequence[Tensor], before: Mapping[int, Tensor]
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._before = before
        self._tally = GramAccumulator(blocks, parameters, len(self.COUNTS))

    def of(self, mask: Mask) -> Mask:
        """The same mask, counted when it is first asked for."""

        def counted(i: int) -> Tensor | None:
            own = mask(i)
            if own is not None and i not in self.kept:
                self._count(i, own)
            return own

        return counted

    def counts(self) -> dict[str, list[float]]:
        """Each number of each block; NaN beside a step before that is not known."""
        for i, earlier in self._before.items():
            if i not in self.kept:  # it takes no part in this step
                self._count(i, torch.zeros_like(earlier), of=0)
        found = self._tally.by_block().diagonal(dim1=1, dim2=2)
        if not self._before:
            found = found.where(torch.arange(len(self.COUNTS)) < 2, torch.nan)
        return dict(zip(self.COUNTS, found.T.tolist(), strict=True))

    def _count(self, i: int, own: Tensor, of: int | None = None) -> None:
        earlier = self._before.get(i, torch.zeros_like(own))
        among = torch.full((), own.numel() if of is None else of, device=own.device)
        numbers = [among, own.sum(), (own & earlier).sum(), (own | earlier).sum()]
        # A Gram matrix of which nothing is asked but its diagonal: that is what is added up.
        self._tally.put(i, torch.stack(numbers).double().diag())
        self.kept[i] = own
