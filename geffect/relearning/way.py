"""How far parameters relearn."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from geffect.devices import there
from geffect.numbers import is_number, is_whole

Unit = Literal["theta", "length", "loss"]
"""What a radius is measured in."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Steps of gradient descent that have a length together, and where theta lies meanwhile."""

    radius: float
    steps: int = 5
    unit: Unit = "theta"
    device: str | torch.device | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 0):
            raise ValueError(
                f"`steps` should be a whole number from 0. Found {self.steps!r}. Pass, say, 5."
            )
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"`unit` should be one of {', '.join(get_args(Unit))}. Found {self.unit!r}. Pass "
                "what the radius is measured in."
            )
        if self.device is not None:
            there(self.device)
        most = 1.0 if self.unit == "loss" else math.inf
        if not (is_number(self.radius) and 0 <= self.radius <= most):
            raise ValueError(
                f"`radius` should be a number from 0{' to 1' if most == 1 else ''}, in units of "
                f"`{self.unit}`. Found {self.radius!r}. Pass "
                f"{'0.5 for half of the loss' if most == 1 else 'how far to go in all'}."
            )
