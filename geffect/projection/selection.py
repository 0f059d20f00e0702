"""Selections: which coordinates a step may change, by what the gradients say of each of them.

One threshold over all coordinates of all parameters together, found before anything is changed, and
a mask of one parameter at a time. Of sharded parameters a process looks at its own part; the
threshold is that of the whole, and costs one small reduction.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from geffect import devices, distributed
from geffect.distributed.processes import all_reduce
from geffect.dots import BLOCK

from . import fused

Scale = Callable[[int], Tensor | None]
"""The root of the mean square of the retain gradient of a parameter; None where there is none."""

SAMPLE = 20_000
EPSILON = 1e-8


@dataclass(frozen=True)
class Roots:
    """A Scale that is taken from mean squares v when it is asked for: sqrt(v / share).

    >>> Roots(lambda i: torch.tensor([2.0]), share=0.5)(0)
    tensor([2.])
    """

    squares: Callable[[int], Tensor | None]
    share: float

    @classmethod
    def none(cls) -> Self:
        """Of parameters that have none."""
        return cls(lambda i: None, share=1.0)

    def __call__(self, i: int) -> Tensor | None:
        return self.root(self.squares(i))

    def root(self, square: Tensor | None) -> Tensor | None:
        """The root of some mean squares."""
        return None if square is None else (square / self.share).sqrt_()


class Selection(ABC):
    """Which coordinates may move."""

    needs_second_moment: ClassVar[bool]
    """Whether it asks for the scale of the retain gradient, which costs a buffer."""
    is_told: ClassVar[bool] = False
    """Whether a report says how much it keeps, and how much of that the step before kept.

    That costs a byte a coordinate."""

    @property
    def epsilon(self) -> float | None:
        """That of |u| / (scale + epsilon), if it keeps what has at least the threshold of this."""
        return None

    @abstractmethod
    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float | Tensor:
        """What the coordinates to keep have at least; NaN where there is no coordinate.

        None stands for a parameter that takes no part. The generator is in the same state on every
        process. A tensor of one number lets a device go on without being waited for.
        """

    @abstractmethod
    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: Any) -> Tensor:
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

    @property
    def epsilon(self) -> float | None:
        # Not of a class made from it, which may take something else.
        return EPSILON if type(self) is Salient else None

    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float | Tensor:
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
        device = present[0][1].device
        sample = torch.zeros(len(picks), dtype=torch.float32, device=device)
        local, where = _places(picks, [gradient for _, gradient in present], apart=apart)
        places = devices.sent(local, device)
        for (i, gradient), own in zip(present, where, strict=True):
            if own.start < own.stop:
                _take_salience(gradient, scale, i, places[own], sample[own])
        if apart:
            sample = all_reduce(sample)  # each place was filled by one process
        # A value of the sample, not one between two of them: those may be infinite.
        bound = torch.quantile(sample.double(), 1 - self.fraction, interpolation="higher")
        return float(bound) if bound.device.type == "cpu" else bound

    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: float | Tensor) -> Tensor:
        return _salience(gradient, scale) >= threshold


@dataclass(frozen=True)
class SaliencyMask(Selection):
    """The coordinates with a large objective gradient: SSU's mask (arXiv 2406.10952).

    Those with |u_i| >= mean |u| + c std |u|, mean and (population) standard deviation over all
    coordinates together, not by tensor. It does not look at the retain data. How many they are is
    told of every step, and how many of them those of the step before were:
    `geffect.analysis.rectification` has the share and the overlap. That costs a byte a coordinate.

    >>> u = [torch.tensor([1.0, -1.0]), torch.tensor([-4.0])]
    >>> select = SaliencyMask(c=1.0)
    >>> bound = select.threshold(u, lambda i: None, torch.Generator())
    >>> round(bound, 4), select.mask(u[1], None, bound)
    (3.4142, tensor([True]))
    """

    c: float = 1.0
    needs_second_moment: ClassVar[bool] = False
    is_told: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isfinite(self.c):
            raise ValueError(
                "`c` of SaliencyMask should be a finite number of standard deviations. Found "
                f"`c = {self.c!r}`. Pass one such as 1.0."
            )

    @property
    def epsilon(self) -> float | None:
        return 1.0 if type(self) is SaliencyMask else None  # |u| / (0 + 1)

    def threshold(
        self, gradients: Sequence[Tensor | None], scale: Scale, generator: torch.Generator
    ) -> float | Tensor:
        present = [gradient for gradient in gradients if gradient is not None]
        apart = any(distributed.is_sharded(gradient) for gradient in present)
        own = [g for g in present if not apart or distributed.is_first_holder(g)]
        count = sum(distributed.local(gradient).numel() for gradient in own)
        sums = torch.full((3,), float(count), dtype=torch.float64)
        if own:
            found = [_moments(distributed.local(gradient)) for gradient in own]
            device = found[0][0].device
            sums = sums.to(device) if device.type == "cpu" else devices.sent(sums, device)
            for place, numbers in enumerate(zip(*found, strict=True), 1):
                sums[place] = torch.stack([number.to(device) for number in numbers]).sum()
        else:
            sums[1:] = 0.0
        if apart:
            sums = all_reduce(sums)
        _, total, squares = sums
        mean = total / sums[0]
        variance = (squares / sums[0] - mean**2).clamp(min=0)
        bound = mean + self.c * variance.sqrt()
        return float(bound) if bound.device.type == "cpu" else bound

    def mask(self, gradient: Tensor, scale: Tensor | None, threshold: float | Tensor) -> Tensor:
        return gradient.abs().float() >= threshold


def _salience(u: Tensor, scale: Tensor | None) -> Tensor:
    return u.abs().float() / (EPSILON if scale is None else scale + EPSILON)


def _take_salience(gradient: Tensor, scale: Scale, i: int, places: Tensor, sample: Tensor) -> None:
    """Put the salience at some places of a parameter into a sample.

    To the bit what a mask finds there: equals of the threshold are kept.
    """
    if isinstance(scale, Roots):
        square = scale.squares(i)
        own = [distributed.local(t).detach() for t in (gradient, square) if t is not None]
        if fused.take_salience(own, scale.share, EPSILON, places, sample):
            return
    whole = scale(i)
    indices = places.to(gradient.device)
    root = None if whole is None else _at(whole, indices)
    sample.copy_(_salience(_at(gradient, indices), root))


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    """The values at these indices of the flattened part of this process."""
    return distributed.local(tensor).detach().reshape(-1)[indices]


def _places(
    picks: Tensor, gradients: Sequence[Tensor], *, apart: bool
) -> tuple[Tensor, list[slice]]:
    """The indices of a sorted sample in what is held here of gradients that follow one another.

    And which of them lie in each gradient.
    """
    local, where, start = picks.clone(), [], 0
    for gradient in gradients:
        own = slice(0, 0)
        if not apart or distributed.is_first_holder(gradient):
            ends = torch.tensor([start + index for index in distributed.local_range(gradient)])
            own = slice(*torch.searchsorted(picks, ends).tolist())
            local[own] -= ends[0]
        where.append(own)
        start += distributed.shape_of(gradient).numel()
    return local, where


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(sum |x|, sum x^2) in float64; on a CPU cast block by block."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type != "cpu":
        norms = [torch.linalg.vector_norm(flat, order, dtype=torch.float64) for order in (1, 2)]
        return norms[0], norms[1].square()
    total, squares = torch.zeros(2, dtype=torch.float64)
    for block in flat.split(BLOCK):
        x = block.double().abs()
        total += x.sum()
        squares += x.dot(x)
    return total, squares
