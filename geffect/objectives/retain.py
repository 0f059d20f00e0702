"""Objectives with a second term that keeps what should stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from geffect.batch import Pair
from geffect.risk import nll

from .base import Mean, Objective, positive
from .likelihood import GradientAscent


@dataclass(frozen=True)
class GradDiff(Objective):
    """Gradient difference: `forget` plus `weight` times the NLL of the retain batch.

    With the default GA this is -R(forget) + weight R(retain), token means; with NPO it is NPO+GD.

    >>> GradDiff(weight=0.5)
    GradDiff(forget=GradientAscent(), weight=0.5)
    """

    forget: Objective = field(default_factory=GradientAscent)
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("GradDiff", "weight", self.weight)

    def components(self, model: Any, batch: Pair) -> dict[str, tuple[Tensor, float]]:
        return {
            **self.forget.components(model, batch),
            "retain": (nll(model, batch["retain"]), self.weight),
        }

    @property
    def means(self) -> Mapping[str, Mean]:
        return {**self.forget.means, "retain": Mean("retain", "tokens")}

    def implicit_weights(self, model: Any, batch: Pair) -> dict[str, Tensor]:
        """Those of `forget`."""
        return self.forget.implicit_weights(model, batch)
