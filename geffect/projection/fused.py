"""Where one kernel does to a parameter what takes torch several passes over it.

Each function answers None where there is no kernel for what it is given: on a CPU, without Triton,
for layouts and types that kernels do not read. Whoever asks takes torch's operations then.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geffect import devices, dots

from .elementwise import Elementwise
from .spaces import Source, Space, is_half

if TYPE_CHECKING:
    from geffect import kernels

Averages = Sequence[Tensor | None]
"""What this process holds of the averages of a parameter."""


def elementwise(
    space: Space, i: int, averages: Averages, mask: Tensor | None, rule: Elementwise | None
) -> "kernels.Elementwise | None":
    """A rule for every coordinate by itself, on parameter i."""
    form = ("KEEP", 0.0) if rule is None else rule.form
    source = None if form is None else _source(space, i, averages, mask)
    if form is None or source is None:
        return None
    from geffect import kernels  # Triton is not everywhere

    retain = _present(averages)
    if len(retain) > kernels.MOST_RETAIN:
        return None
    name, alpha = form
    return kernels.Elementwise(*source, retain, mask, getattr(kernels, name), alpha)


class Weighted:
    """The weights of a direction and its averages, on one parameter."""

    def __init__(self, space: Space, i: int, kernel: "kernels.Weighted", there: Sequence[bool]):
        self._space, self._i, self._kernel = space, i, kernel
        self._there = [k for k, is_there in enumerate(there) if is_there]
        self._count = len(there)

    def gram(self, size: int, weights: Sequence[float] | None) -> Tensor:
        """The Gram matrix `Float64[size, size]` of them, in as many ways as have room in it.

        With weights, that of what would be written of u by them.
        """
        ways = size // self._count
        products = self._kernel.gram(ways, self._of(weights))
        indices = [way * self._count + k for way in range(ways) for k in self._there]
        return dots.placed(products, indices, size)

    def write(self, weights: Sequence[float], *, anew: bool) -> None:
        """Make the direction what the weights say."""
        kernel, own = self._kernel, self._of(weights)
        assert own is not None
        if kernel.before is None:
            self._space.change(self._i, lambda: kernel.write(own, kernel.now, anew=anew))
            return
        # What an interrupt may begin anew is one operation, of which torch keeps count.
        new = torch.empty_like(kernel.now)
        kernel.write(own, new, anew=anew)
        self._space.change(self._i, lambda: kernel.now.copy_(new))

    def _of(self, weights: Sequence[float] | None) -> list[float] | None:
        return None if weights is None else [weights[k] for k in self._there]


def weighted(
    space: Space,
    i: int,
    averages: Averages,
    mask: Tensor | None,
    metric: Tensor | None,
    *,
    ways: int,
) -> Weighted | None:
    """Weights on parameter i, where torch would need more than a Gram matrix and a sum for them.

    `ways` is in how many ways the direction and the averages are seen at most.
    """
    source = _source(space, i, averages, mask, metric)
    if source is None or source[0].itemsize == 8:
        return None
    now, before = source
    if before is None and mask is None and metric is None and not is_half(now):
        return None
    from geffect import kernels  # Triton is not everywhere

    retain = _present(averages)
    if len(retain) > kernels.MOST_RETAIN or ways * (1 + len(retain)) > kernels.MOST:
        return None
    kernel = kernels.Weighted(now, before, retain, mask, metric)
    return Weighted(space, i, kernel, [True, *(r is not None for r in averages)])


def salient(
    gradient: Tensor, square: Tensor | None, share: float, threshold: float | Tensor, epsilon: float
) -> Tensor | None:
    """The mask of the coordinates where |u| / (sqrt(v / share) + epsilon) reaches the threshold."""
    tensors = [gradient, *_present([square])]
    if not (devices.has_kernels(*tensors) and all(t.is_contiguous() for t in tensors)):
        return None
    from geffect import kernels  # Triton is not everywhere

    bound = (
        threshold.to(gradient.device)
        if isinstance(threshold, Tensor)
        else torch.full((), threshold, device=gradient.device)
    )
    return kernels.salient(gradient, square, share, epsilon, bound)


def take_salience(
    tensors: Sequence[Tensor], share: float, epsilon: float, places: Tensor, sample: Tensor
) -> bool:
    """Whether a kernel has put the salience at some places into a sample.

    `tensors` are a gradient, and the square beside it where there is one.
    """
    if not (devices.has_kernels(sample, *tensors) and all(t.is_contiguous() for t in tensors)):
        return False
    from geffect import kernels  # Triton is not everywhere

    square = tensors[1] if len(tensors) > 1 else None
    kernels.take_salience(tensors[0], square, share, epsilon, places, sample)
    return True


def _source(space: Space, i: int, averages: Averages, *others: Tensor | None) -> Source | None:
    """Where kernels find the direction of a parameter, if they read all that belongs to it."""
    source = space.source(i) if any(space.parts(i)) else None
    if source is None:
        return None
    numbers = _present([*source, *averages])
    packed = all(t.is_contiguous() for t in [*numbers, *_present(others)])
    return source if packed and devices.has_kernels(*numbers) else None


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]
