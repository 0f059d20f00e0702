"""Unlearning objectives: `(model, {"forget": batch, "retain": batch}) -> scalar`, minimised."""

from geffect.forwards import SharedForward
from geffect.risk import nll

from .base import Component, Objective, Reduction, step_losses
from .catalogue import CATALOGUE, as_objective, named
from .combination import Combination
from .likelihood import GradientAscent, WeightedGradientAscent
from .options import options_of, provenance, with_options
from .preference import NPO, TNPO, WTNPO
from .reference import AdapterBase, FrozenModel, Reference
from .reference_likelihoods import Likelihoods
from .retain import GradDiff, GradientDescent, Regularised
from .sides import answers_of, check_sides
from .simnpo import SimNPO
from .weights import statistics

__all__ = [
    "CATALOGUE",
    "NPO",
    "TNPO",
    "WTNPO",
    "AdapterBase",
    "Combination",
    "Component",
    "FrozenModel",
    "GradDiff",
    "GradientAscent",
    "GradientDescent",
    "Likelihoods",
    "Objective",
    "Reduction",
    "Reference",
    "Regularised",
    "SharedForward",
    "SimNPO",
    "WeightedGradientAscent",
    "answers_of",
    "as_objective",
    "check_sides",
    "named",
    "nll",
    "options_of",
    "provenance",
    "statistics",
    "step_losses",
    "with_options",
]
