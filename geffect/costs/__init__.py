"""Costs: what recording and rectifying will take, said of a model's configuration alone."""

from .step import Estimate, estimate
from .traced import Shape

__all__ = ["Estimate", "Shape", "estimate"]
