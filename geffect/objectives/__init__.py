"""Unlearning objectives: `(model, {"forget": batch, "retain": batch}) -> scalar`, minimised."""

from geffect.forwards import SharedForward
from geffect.risk import nll

from .acquisition import SKU, SSUAcquire
from .base import Component, Objective, Reduction, kept_losses, step_losses
from .catalogue import CATALOGUE, REGULARISERS, as_objective, named, names, probable, spelt
from .ceu import CEU
from .combination import Combination
from .control import CappedAscent, LikelihoodControl, LowestLossAscent, TemperedAscent
from .dpo import DPO
from .kl import KL
from .labels import AdversarialLabels, RandomLabels
from .likelihood import GradientAscent, WeightedGradientAscent
from .of_run import OfRun
from .options import options_of, provenance, with_options
from .pdu import PDU
from .po import PO
from .preference import NPO, TNPO, WTNPO
from .proxy_kl import ProxyKL
from .reference import AdapterBase, FrozenModel, Reference
from .reference_likelihoods import Likelihoods
from .retain import GradDiff, GradientDescent, Regularised
from .rmu import RMU
from .rr import RR
from .satimp import SatImp
from .sides import ALTERNATE, answers_of, check_sides
from .simnpo import SimNPO
from .undial import UNDIAL
from .weights import statistics

__all__ = [
    "ALTERNATE",
    "CATALOGUE",
    "CEU",
    "DPO",
    "KL",
    "NPO",
    "PDU",
    "PO",
    "REGULARISERS",
    "RMU",
    "RR",
    "SKU",
    "TNPO",
    "UNDIAL",
    "WTNPO",
    "AdapterBase",
    "AdversarialLabels",
    "CappedAscent",
    "Combination",
    "Component",
    "FrozenModel",
    "GradDiff",
    "GradientAscent",
    "GradientDescent",
    "LikelihoodControl",
    "Likelihoods",
    "LowestLossAscent",
    "Objective",
    "OfRun",
    "ProxyKL",
    "RandomLabels",
    "Reduction",
    "Reference",
    "Regularised",
    "SSUAcquire",
    "SatImp",
    "SharedForward",
    "SimNPO",
    "TemperedAscent",
    "WeightedGradientAscent",
    "answers_of",
    "as_objective",
    "check_sides",
    "kept_losses",
    "named",
    "names",
    "nll",
    "options_of",
    "probable",
    "provenance",
    "spelt",
    "statistics",
    "step_losses",
    "with_options",
]
