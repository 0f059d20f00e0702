"""Gradient rectification: rules on Gram matrices, and the rectifier that applies them."""

from .rectifier import Rectifier
from .rules import Rule, gru

__all__ = ["Rectifier", "Rule", "gru"]
