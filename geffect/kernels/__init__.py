"""Kernels: passes over the gradients on a GPU, each of which reads a number once, in Triton.

Every program of a kernel looks at one tile of the coordinates, in float64, and writes what it found
into a row of its own. The rows are added up in one order: no atomics, so that results are the same
every time. `geffect.devices.has_kernels` says what they are for.
"""

from .direction import MOST_RETAIN
from .elementwise import HALT, KEEP, SAGO, SAGO_SUM, Elementwise
from .gram import gram
from .launching import MOST
from .salience import salient, take_salience
from .weighted import Weighted

__all__ = [
    "HALT",
    "KEEP",
    "MOST",
    "MOST_RETAIN",
    "SAGO",
    "SAGO_SUM",
    "Elementwise",
    "Weighted",
    "gram",
    "salient",
    "take_salience",
]
