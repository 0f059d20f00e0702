"""Analyzers: from a run to a tidy table of scores. They need neither torch nor the model."""

from .accumulated import accumulated
from .angles import angles
from .compare import Comparison, compare
from .conflict import conflict
from .cosine import cosine
from .drift import drift
from .edited import edited
from .evaluations import agreement, join, read_evaluations
from .g_effect import g_effect
from .implicit_weights import implicit_weights
from .instances import instances
from .intervals import intervals
from .noise_floor import noise_floor
from .norm_ratio import norm_ratio
from .predicted_change import predicted_change
from .recommended_layers import Recommendation, recommended_layers
from .rectification import rectification
from .requests import revivals, task_vectors
from .setting import Setting, setting
from .tables import METRICS, SAMPLES, TOKENS, as_columns, kept
from .tokens import tokens
from .violation import violation

__all__ = [
    "METRICS",
    "SAMPLES",
    "TOKENS",
    "Comparison",
    "Recommendation",
    "Setting",
    "accumulated",
    "agreement",
    "angles",
    "as_columns",
    "compare",
    "conflict",
    "cosine",
    "drift",
    "edited",
    "g_effect",
    "implicit_weights",
    "instances",
    "intervals",
    "join",
    "kept",
    "noise_floor",
    "norm_ratio",
    "predicted_change",
    "read_evaluations",
    "recommended_layers",
    "rectification",
    "revivals",
    "setting",
    "task_vectors",
    "tokens",
    "violation",
]
