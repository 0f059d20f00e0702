"""Unlearning objectives: `(model, {"forget": batch, "retain": batch}) -> scalar`, minimised."""

from geffect.forwards import SharedForward
from geffect.risk import nll

from .base import Component, Objective, Reduction, step_losses
from .catalogue import CATALOGUE, REGULARISERS, as_objective, named, names, spelt
from .combination import Combination
from .kl import KL
from .labels import AdversarialLabels, RandomLabels
from .likelihood import GradientAscent, WeightedGradientAscent
from .options import options_of, provenance, with_options
from .preference import NPO, TNPO, WTNPO
from .reference import AdapterBase, FrozenModel, Reference
from .reference_likelihoods import Likelihoods
from .retain import GradDiff, GradientDescent, Regularised
from .rr import RR
from .sides import answers_of, check_sides
from .simnpo import SimNPO
from .weights import statistics

__all__ = [
    "CATALOGUE",
    "KL",
    "NPO",
    "REGULARISERS",
    "RR",
    "TNPO",
    "WTNPO",
    "AdapterBase",
    "AdversarialLabels",
    "Combination",
    "Component",
    "FrozenModel",
    "GradDiff",
    "GradientAscent",
    "GradientDescent",
    "Likelihoods",
    "Objective",
    "RandomLabels",
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
    "names",
    "nll",
    "options_of",
    "provenance",
    "spelt",
    "statistics",
    "step_losses",
    "with_options",
]
