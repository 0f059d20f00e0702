"""Pictures of score tables: a table goes in, labelled axes come out, nothing is computed.

All take axes, colours, limits, a title and words for their artist in one way (`conventions`);
`style("column")`, "page" and "slide" make them for print.
"""

from .accumulated import accumulated
from .angles import angles
from .contours import contours
from .crossings import crossings
from .depth import depth
from .evaluations import evaluations
from .half_spaces import half_spaces
from .heatmap import heatmap
from .lines import profile, trajectory
from .metrics import metrics
from .noise_floor import noise_floor
from .norm_ratio import norm_ratio
from .pairs import pairs
from .pixels import pixels
from .rectification import rectification
from .relearning import relearning
from .shares import shares
from .sheet import facets, sheet
from .spans import spans
from .style import style
from .text import text
from .timeline import timeline
from .tradeoff import tradeoff
from .walk import walk

__all__ = [
    "accumulated",
    "angles",
    "contours",
    "crossings",
    "depth",
    "evaluations",
    "facets",
    "half_spaces",
    "heatmap",
    "metrics",
    "noise_floor",
    "norm_ratio",
    "pairs",
    "pixels",
    "profile",
    "rectification",
    "relearning",
    "shares",
    "sheet",
    "spans",
    "style",
    "text",
    "timeline",
    "tradeoff",
    "trajectory",
    "walk",
]
