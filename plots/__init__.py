"""Pictures of score tables: a table goes in, labelled axes come out, nothing is computed."""

from .contours import contours
from .heatmap import heatmap
from .lines import profile, trajectory
from .sheet import facets, sheet
from .text import text
from .tradeoff import tradeoff

__all__ = ["contours", "facets", "heatmap", "profile", "sheet", "text", "tradeoff", "trajectory"]
