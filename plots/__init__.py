"""Pictures of score tables: a table goes in, labelled axes come out, nothing is computed."""

from .heatmap import heatmap
from .lines import profile, trajectory
from .sheet import facets, sheet
from .tradeoff import tradeoff

__all__ = ["facets", "heatmap", "profile", "sheet", "tradeoff", "trajectory"]
