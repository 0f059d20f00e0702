"""The largest coordinate of a gradient, which tells whether there is one, and all are finite."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from geffect import distributed, dots


def peak(vector: Iterable[Tensor | None]) -> float:
    """The largest coordinate, without its sign, of what this process holds; NaN if one is.

    It tells zero and infinity, and unlike a sum of squares it neither under- nor overflows.
    """
    return float(largest(vector))


def largest(vector: Iterable[Tensor | None]) -> Tensor:
    """The same as a tensor, which no device has been waited for."""
    parts = [dots.dense(distributed.local(t)).detach() for t in vector if t is not None]
    ends = _ends([part for part in parts if part.numel()])
    if not ends:
        return torch.zeros(())
    return torch.cat([end.to(ends[0].device) for end in ends]).abs().max()


def is_empty(parameters: Iterable[Tensor]) -> bool:
    """Whether `.grad` of all is None or zero; one that is NaN is not.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> is_empty([weight])
    False
    """
    return peak(parameter.grad for parameter in parameters) == 0.0


def _ends(parts: Iterable[Tensor]) -> list[Tensor]:
    """Vectors of few numbers, the largest of which, without signs, is that of the parts."""
    ends, together = [], dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for part in parts:
        if part.device.type == "cpu":
            ends.append(_ends_on_cpu(part))
        else:
            together.setdefault((part.device, part.dtype), []).append(part)
    return ends + [
        torch.stack(torch._foreach_norm(alike, torch.inf)).float() for alike in together.values()
    ]


def _ends_on_cpu(part: Tensor) -> Tensor:
    """The smallest and the largest number, for which numpy takes two thirds of torch's time."""
    if part.dtype not in (torch.float32, torch.float64):
        return torch.stack(part.aminmax()).float()
    # The second look at a block finds it in the cache.
    blocks = map(Tensor.numpy, part.reshape(-1).split(dots.BLOCK))
    found = [end for block in blocks for end in (block.min(), block.max())]
    return torch.from_numpy(np.array(found)).float()
