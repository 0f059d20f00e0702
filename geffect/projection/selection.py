"""Selections: which coordinates a step may change, by what the gradients say of each of them.

One threshold over all coordinates of all parameters together, found before anything is changed, and
a mask of one parameter at a time. Of sharded parameters a process looks at its own part; the
threshold is that of the whole, and costs one small reduction.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from geffect import distributed
from geffect.distributed.processes import all_reduce
from geffect.dots import BLOCK

Scale = Callable[[int], Tensor | None]
"""The root of the mean square of the retain gradient of a parameter; None where there is none."""

SAMPLE = 20_000
EPSILON = 1e-8


class Selection(ABC):
    """Which coordinates may move."""

    needs_second_moment: ClassVar[bool]
    """Whether it asks for the scale of the retain gradient, which costs a buffer."""

    @abstractmethod
    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float:
        """What the coordinates to keep have at least; NaN where there is no coordinate.

        None stands for a parameter that takes no part. The generator is in the same state on every
        process.
        """

    @abstractmethod
    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: float) -> Tensor:
        """The coordinates of one parameter to keep, `Bool` of its shape."""


@dataclass(frozen=True)
class Salient(Selection):
    """The fraction of the coordinates that the objective needs most and the retain data least.

    Those with the largest a_i = |u_i| / (sqrt(v_i) + 1e-8), where u is the objective gradient and v
    the mean square of the retain gradient: the importance ratio of selective synaptic dampening
    (arXiv 2308.07707), as the mask of a step. The threshold is the quantile of a random sample of
    20,000 coordinates, or of all where there are no more; the sample does not depend on how the
    parameters are sharded. Equals of the threshold are kept.

    >>> u, scale = torch.tensor([2.0, 2.0, 1.0, -8.0]), torch.tensor([0.1, 1.0, 1.0, 2.0])
    >>> select = Salient(0.5)
    >>> bound = select.threshold([u], lambda i: scale, torch.Generator())
    >>> round(bound, 4), select.mask(u, scale, bound)
    (4.0, tensor([ True, False, False,  True]))
    """

    fraction: float
    needs_second_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                "`fraction` of Salient should be above 0 and at most 1. Found "
                f"`fraction = {self.fraction!r}`. Pass a fraction such as 0.1."
            )

    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float:
        present = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        total = sum(distributed.shape_of(gradient).numel() for _, gradient in present)
        if total == 0:
            return float("nan")
        if self.fraction == 1:
            return -torch.inf
        # Indices into the whole, the same on every process; each looks up what is in its own part.
        picks = torch.arange(total)
        if total > SAMPLE:
            picks = torch.randint(total, (SAMPLE,), generator=generator).sort().values
        apart = any(distributed.is_sharded(gradient) for _, gradient in present)
        sample = torch.zeros(len(picks), dtype=torch.float32, device=present[0][1].device)
        start = 0
        for i, gradient in present:
            if not apart or distributed.is_first_holder(gradient):
                begin, end = (start + index for index in distributed.local_range(gradient))
                first, last = torch.searchsorted(picks, torch.tensor([begin, end])).tolist()
                if first < last:
                    indices = (picks[first:last] - begin).to(gradient.device)
                    sample[first:last] = _salience(
                        _at(gradient, indices), None if (s := scale(i)) is None else _at(s, indices)
                    )
            start += distributed.shape_of(gradient).numel()
        if apart:
            sample = all_reduce(sample)  # each place was filled by one process
        # A value of the sample, not one between two of them: those may be infinite.
        return float(torch.quantile(sample.double(), 1 - self.fraction, interpolation="higher"))

    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: float) -> Tensor:
        return _salience(gradient, scale) >= threshold


@dataclass(frozen=True)
class SaliencyMask(Selection):
    """The coordinates with a large objective gradient: SSU's mask (arXiv 2406.10952).

    Those with |u_i| >= mean |u| + c std |u|, mean and (population) standard deviation over all
    coordinates together, not by tensor. It does not look at the retain data.

    >>> u = [torch.tensor([1.0, -1.0]), torch.tensor([-4.0])]
    >>> select = SaliencyMask(c=1.0)
    >>> bound = select.threshold(u, lambda i: None, torch.Generator())
    >>> round(bound, 4), select.mask(u[1], None, bound)
    (3.4142, tensor([True]))
    """

    c: float = 1.0
    needs_second_moment: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isfinite(self.c):
            raise ValueError(
                "`c` of SaliencyMask should be a finite number of standard deviations. Found "
                f"`c = {self.c!r}`. Pass one such as 1.0."
            )

    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float:
        present = [gradient for gradient in gradients if gradient is not None]
        apart = any(distributed.is_sharded(gradient) for gradient in present)
        sums = torch.zeros(3, dtype=torch.float64)
        if present:
            sums = sums.to(present[0].device)
        for gradient in present:
            if not apart or distributed.is_first_holder(gradient):
                sums += _moments(distributed.local(gradient)).to(sums.device)
        if apart:
            sums = all_reduce(sums)
        count, total, squares = sums.cpu()
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        return float(mean + self.c * variance.sqrt())

    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: float) -> Tensor:
        return gradient.abs().float() >= threshold


def _salience(u: Tensor, scale: Tensor | None) -> Tensor:
    return u.abs().float() / (EPSILON if scale is None else scale + EPSILON)


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    """The values at these indices of the flattened part of this process."""
    return distributed.local(tensor).detach().reshape(-1)[indices]


def _moments(tensor: Tensor) -> Tensor:
    """(n, sum |x|, sum x^2) in float64, cast block by block."""
    sums = torch.zeros(3, dtype=torch.float64, device=tensor.device)
    for block in tensor.detach().reshape(-1).split(BLOCK):
        x = block.double().abs()
        sums += torch.stack([torch.full_like(sums[0], x.numel()), x.sum(), x.dot(x)])
    return sums
