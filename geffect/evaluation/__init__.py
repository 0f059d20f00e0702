"""Evaluators: what a model knows and what is gone, from its answers and from its parameters.

They take models and data and give reports; none takes a gradient.
"""

from .closure import Closure, Rule, Triple, close
from .deep_unlearning import DeepUnlearning, deep_unlearning
from .edu_relat import Family, Target
from .extraction import extraction_strength
from .minimal_sets import minimal_sets

__all__ = [
    "Closure",
    "DeepUnlearning",
    "Family",
    "Rule",
    "Target",
    "Triple",
    "close",
    "deep_unlearning",
    "extraction_strength",
    "minimal_sets",
]
