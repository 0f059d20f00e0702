"""Unlearning objectives: `(model, {"forget": batch, "retain": batch}) -> scalar`, minimised."""

from geffect.risk import nll

from .base import Mean, Objective, SharedForward
from .likelihood import GradientAscent, WeightedGradientAscent
from .preference import NPO, TNPO, WTNPO
from .retain import GradDiff
from .weights import statistics

__all__ = [
    "NPO",
    "TNPO",
    "WTNPO",
    "GradDiff",
    "GradientAscent",
    "Mean",
    "Objective",
    "SharedForward",
    "WeightedGradientAscent",
    "nll",
    "statistics",
]
