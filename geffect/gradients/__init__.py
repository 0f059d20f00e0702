"""The gradients of one step: one backward pass a loss, and nothing else changed."""

from geffect.losses import Loss

from .of_step import Gradients
from .peaks import is_empty, peak
from .separate import differentiate, of_all_ranks, reduced, separate
from .streaming import stream
from .transforms import AtCopy, GradientTransform, Rectification
from .vectors import Vector, Weights, combined, weighted_sum

__all__ = [
    "AtCopy",
    "GradientTransform",
    "Gradients",
    "Loss",
    "Rectification",
    "Vector",
    "Weights",
    "combined",
    "differentiate",
    "is_empty",
    "of_all_ranks",
    "peak",
    "reduced",
    "separate",
    "stream",
    "weighted_sum",
]
