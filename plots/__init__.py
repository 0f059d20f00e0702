"""Pictures of score tables: a table goes in, labelled axes come out, nothing is computed.

All take axes, colours, limits, a title and words for their artist in one way (`conventions`);
`style("column")`, "page" and "slide" make them for print.
"""

from .contours import contours
from .crossings import crossings
from .evaluations import evaluations
from .half_spaces import half_spaces
from .heatmap import heatmap
from .lines import profile, trajectory
from .metrics import metrics
from .pairs import pairs
from .rectification import rectification
from .sheet import facets, sheet
from .spans import spans
from .style import style
from .text import text
from .tradeoff import tradeoff

__all__ = [
    "contours",
    "crossings",
    "evaluations",
    "facets",
    "half_spaces",
    "heatmap",
    "metrics",
    "pairs",
    "profile",
    "rectification",
    "sheet",
    "spans",
    "style",
    "text",
    "tradeoff",
    "trajectory",
]
