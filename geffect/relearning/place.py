"""Where parameters stand while they relearn, and where they were."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from geffect import distributed, dots
from geffect.gradients import Vector

LOST = 0.5
"""The share of a copy's way that rounding may change before it is told."""

TURNED = 0.1
"""The share of the length of all steps that a copy is away at least, or it is told."""


class Place:
    """Where parameters stand, and where they were. Those in half precision move in float32."""

    def __init__(
        self, parameters: Sequence[Tensor], device: str | torch.device | None = None
    ) -> None:
        self.parameters, self.path = parameters, 0.0
        self._held = [distributed.local(parameter.detach()) for parameter in parameters]
        self._before = [tensor.to(device or tensor.device, copy=True) for tensor in self._held]
        self._at = [t.float() if t.itemsize < 4 else t for t in self._held]
        torch.clear_autocast_cache()  # what it has cast belongs to a graph of training

    @torch.no_grad()
    def move(self, gradient: Vector, norm: float, length: float) -> None:
        """A step of this length down a gradient of this norm."""
        for held, at, tensor in zip(self._held, self._at, gradient, strict=True):
            if tensor is not None:
                own = dots.dense(distributed.local(tensor.detach()))
                at.add_(own.to(device=at.device, dtype=at.dtype), alpha=-length / norm)
                if at is not held:
                    held.copy_(at)
        self.path += length
        torch.clear_autocast_cache()

    @torch.no_grad()
    def measured(self) -> float:
        """How far the steps have led, which are all taken; a warning where rounding made that."""
        products = [
            dots.gram([held.to(at.dtype) - own, at - own])
            for held, at, before in zip(self._held, self._at, self._before, strict=True)
            for own in (before.to(at),)
        ]
        self._at = self._held  # what moved in float32 is there
        over = [distributed.holders(parameter) for parameter in self.parameters]
        (moved, both), (_, meant) = dots.gathered(products, over).sum(0).tolist()
        rounded = moved + meant - 2 * both > LOST**2 * meant
        if rounded or math.sqrt(moved) < TURNED * self.path:
            warnings.warn(
                f"Steps of relearning, {self.path:.3g} long together, should lead away. Found a "
                f"copy {math.sqrt(moved):.3g} away where {math.sqrt(meant):.3g} was meant: "
                "rounding takes most of the way, or steps turn back. Where weights are coarse "
                "choose a larger `radius` or train in a finer type, else a smaller one.",
                stacklevel=5,
            )
        return math.sqrt(moved)

    @torch.no_grad()
    def put_back(self) -> None:
        """Every bit is that of before."""
        for held, before in zip(self._held, self._before, strict=True):
            held.copy_(before)
        torch.clear_autocast_cache()
