"""Unlearning objectives: `(model, {"forget": batch, "retain": batch}) -> scalar`, minimised."""

from .base import Objective, SharedForward, nll
from .likelihood import GradientAscent, WeightedGradientAscent
from .preference import NPO
from .retain import GradDiff

__all__ = [
    "NPO",
    "GradDiff",
    "GradientAscent",
    "Objective",
    "SharedForward",
    "WeightedGradientAscent",
    "nll",
]
