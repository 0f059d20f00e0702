"""Analyzers: from a run to a tidy table of scores. They need neither torch nor the model."""

from .conflict import conflict
from .cosine import cosine
from .g_effect import g_effect
from .predicted_change import predicted_change
from .violation import violation

__all__ = ["conflict", "cosine", "g_effect", "predicted_change", "violation"]
