"""Gradient rectification: rules on Gram matrices, and the rectifier that applies them."""

from .collapse import Collapse
from .elementwise import SAGO, Elementwise
from .from_torchjd import from_torchjd
from .hamu import free_forgetting, hamu
from .kept import State
from .rectifier import Rectifier
from .rules import Promise, Rule, a_gem, blur, gru, nearest, off_span, orthogonal, pcgrad
from .selection import SaliencyMask, Salient, Selection

__all__ = [
    "SAGO",
    "Collapse",
    "Elementwise",
    "Promise",
    "Rectifier",
    "Rule",
    "SaliencyMask",
    "Salient",
    "Selection",
    "State",
    "a_gem",
    "blur",
    "free_forgetting",
    "from_torchjd",
    "gru",
    "hamu",
    "nearest",
    "off_span",
    "orthogonal",
    "pcgrad",
]
