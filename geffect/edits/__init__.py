"""Edits: changes of a model's parameters that are computed at once, instead of by training."""

from .base import Data, Edit, Outcome
from .catalogue import CATALOGUE, as_edit, named, options_of
from .change import Change
from .linear import ClosedFormLinear, derived_input, layer_inputs
from .mixing import Calibration, Mixing, calibrated
from .newton import Newton
from .repselect import RepSelect
from .ssd import LFSSD, SSD
from .strength import Strength, Varied
from .task_vector import TaskVectorNegation

__all__ = [
    "CATALOGUE",
    "LFSSD",
    "SSD",
    "Calibration",
    "Change",
    "ClosedFormLinear",
    "Data",
    "Edit",
    "Mixing",
    "Newton",
    "Outcome",
    "RepSelect",
    "Strength",
    "TaskVectorNegation",
    "Varied",
    "as_edit",
    "calibrated",
    "derived_input",
    "layer_inputs",
    "named",
    "options_of",
]
