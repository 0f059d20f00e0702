"""Edits: changes of a model's parameters that are computed at once, instead of by training."""

from .base import Data, Edit, Outcome
from .catalogue import CATALOGUE, as_edit, named, options_of
from .change import Change
from .ssd import LFSSD, SSD
from .task_vector import TaskVectorNegation

__all__ = [
    "CATALOGUE",
    "LFSSD",
    "SSD",
    "Change",
    "Data",
    "Edit",
    "Outcome",
    "TaskVectorNegation",
    "as_edit",
    "named",
    "options_of",
]
