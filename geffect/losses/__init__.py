"""The losses of a step: the backward passes they need, and what each is in terms of these."""

from .given import Loss, NotFinite, Scalar, check_function, declared, of_objective
from .graph import Graph
from .passes import Elsewhere, Passes, check_no_step_inside, check_reached, loss_scale, plan

__all__ = [
    "Elsewhere",
    "Graph",
    "Loss",
    "NotFinite",
    "Passes",
    "Scalar",
    "check_function",
    "check_no_step_inside",
    "check_reached",
    "declared",
    "loss_scale",
    "of_objective",
    "plan",
]
