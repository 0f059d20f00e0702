"""Pictures of score tables: a table goes in, labelled axes come out, nothing is computed."""

from .contours import contours
from .crossings import crossings
from .evaluations import evaluations
from .heatmap import heatmap
from .lines import profile, trajectory
from .pairs import pairs
from .rectification import rectification
from .sheet import facets, sheet
from .spans import spans
from .text import text
from .tradeoff import tradeoff

__all__ = [
    "contours",
    "crossings",
    "evaluations",
    "facets",
    "heatmap",
    "pairs",
    "profile",
    "rectification",
    "sheet",
    "spans",
    "text",
    "tradeoff",
    "trajectory",
]
