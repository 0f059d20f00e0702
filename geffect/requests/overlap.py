"""How alike the displacements of two requests are, parameter by parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from geffect import dots


@dataclass(frozen=True)
class Moved:
    """A displacement by parameter, in the memory of the host, and the numbers that moved most.

    A number is in the mask if it is among the `share` of all numbers of the model that moved most,
    and if it moved at all. The share is of all parameters together, not of each.
    """

    vector: Sequence[Tensor]
    masks: Sequence[Tensor]

    @classmethod
    def of(cls, vector: Sequence[Tensor], share: float) -> "Moved":
        """That of a displacement.

        >>> moved = Moved.of([torch.tensor([3.0, -1.0]), torch.tensor([0.0, 2.0])], share=0.5)
        >>> [mask.tolist() for mask in moved.masks]
        [[True, False], [False, True]]
        """
        kept = [part.cpu() for part in vector]
        lengths = torch.cat([part.abs().flatten() for part in kept])
        least = lengths.topk(max(1, ceil(share * len(lengths)))).values[-1]
        return cls(kept, [(part.abs() >= least) & (part != 0) for part in kept])


@dataclass(frozen=True)
class Likeness:
    """What two displacements have in common in one parameter.

    - `inner`: their inner product, in float64; `square` and `other_square`: with themselves.
    - `both`, `either`: how many numbers are in both masks, and in one of them at least.
    """

    inner: float
    square: float
    other_square: float
    both: int
    either: int


def likeness(moved: Moved, other: Moved) -> list[Likeness]:
    """What two displacements have in common, parameter by parameter.

    >>> a = Moved.of([torch.tensor([1.0, 0.0, 2.0])], share=1.0)
    >>> likeness(a, Moved.of([torch.tensor([0.0, 5.0, 3.0])], share=1.0))
    [Likeness(inner=6.0, square=5.0, other_square=34.0, both=1, either=3)]
    """
    found = []
    for ours, theirs, here, there in zip(
        moved.vector, other.vector, moved.masks, other.masks, strict=True
    ):
        K = dots.gram([ours, theirs]).tolist()
        both, either = int((here & there).sum()), int((here | there).sum())
        found.append(Likeness(K[0][1], K[0][0], K[1][1], both, either))
    return found
