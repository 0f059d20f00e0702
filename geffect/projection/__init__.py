"""Gradient rectification: rules on Gram matrices, and the rectifier that applies them."""

from .elementwise import SAGO, Elementwise
from .from_torchjd import from_torchjd
from .memory import State
from .rectifier import Rectifier
from .rules import Rule, a_gem, blur, gru, nearest, off_span, orthogonal, pcgrad
from .selection import SaliencyMask, Salient, Selection

__all__ = [
    "SAGO",
    "Elementwise",
    "Rectifier",
    "Rule",
    "SaliencyMask",
    "Salient",
    "Selection",
    "State",
    "a_gem",
    "blur",
    "from_torchjd",
    "gru",
    "nearest",
    "off_span",
    "orthogonal",
    "pcgrad",
]
