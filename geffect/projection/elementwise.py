"""Rules that look at every coordinate by itself and are therefore no function of a Gram matrix."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

SAMPLE = 20_000
EPSILON = 1e-8


def opposed(u: Tensor, r: Tensor) -> Tensor:
    """The coordinates at which u harms r: u_i r_i < 0, `Bool` of their shape.

    With these set to zero, u is GRU's answer to the constraint x_i r_i >= 0 asked of every
    coordinate.

    >>> opposed(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 2.0, -1.0]))
    tensor([False,  True, False])
    """
    # Signs, not the product: that of two tiny numbers would underflow to no conflict.
    return u.sign() * r.sign() < 0


def salience(u: Tensor, second_moment: Tensor | None) -> Tensor:
    """How much the objective asks for a coordinate that the retain data leave alone.

    a_i = |u_i| / (sqrt(v_i) + 1e-8) with v the second moment of the retain gradient: the ratio of
    selective synaptic dampening, used as the mask of a step.
    """
    scale = 0.0 if second_moment is None else second_moment.sqrt()
    return u.abs().float() / (scale + EPSILON)


def most_salient(
    saliences: Sequence[Tensor | None], fraction: float, generator: torch.Generator
) -> list[Tensor | None]:
    """The mask of the top `fraction` of all coordinates together, `Bool` a tensor.

    The threshold is the quantile of a random sample of 20,000 coordinates, or of all where there
    are no more.

    >>> tensors = [torch.tensor([1.0, 9.0]), torch.tensor([2.0, 3.0])]
    >>> most_salient(tensors, 0.25, torch.Generator())
    [tensor([False,  True]), tensor([False, False])]
    """
    present = [tensor for tensor in saliences if tensor is not None]
    if not present:
        return [None for _ in saliences]
    threshold = torch.quantile(_sample(present, generator), 1 - fraction)
    return [None if tensor is None else tensor >= threshold for tensor in saliences]


def _sample(tensors: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    flat = [tensor.reshape(-1) for tensor in tensors]
    ends = list(accumulate(tensor.numel() for tensor in flat))
    if ends[-1] <= SAMPLE:
        return torch.cat(flat)
    picks = torch.randint(ends[-1], (SAMPLE,), generator=generator).sort().values
    bounds = torch.searchsorted(picks, torch.tensor([0, *ends]))
    starts = [0, *ends]
    return torch.cat(
        [
            tensor[(picks[first:last] - start).to(tensor.device)]
            for tensor, start, (first, last) in zip(
                flat, starts, pairwise(bounds.tolist()), strict=False
            )
        ]
    )
