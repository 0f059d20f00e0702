"""What pictures are made for: a width, and sizes of text that can be read there.

The reader's own rcParams stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.font_manager import FontProperties

LEAST = 7.0  # points of the smallest text
NARROW = 5.0  # inches below which a picture has no room beside the data

EMBEDDED: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}
"""TrueType in PDF and PostScript, which journals ask for; text of an SVG that stays text."""


MEDIUM_TEXT = ("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize")
SMALL_TEXT = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")


STROKES = {"linewidth": 1, "linewidths": 1, "markersize": 1, "markeredgewidth": 1, "s": 2}
"""Keywords that say how broad lines are and how large marks, which `s` says by their area."""


@dataclass(frozen=True)
class Medium:
    """Where a picture will stand: its width in inches, its text in points, panels side by side.

    - `stroke`: by how much lines and marks are broader than on paper.
    """

    width: float
    text: float
    abreast: int
    stroke: float = 1.0


MEDIA = {
    "column": Medium(3.3, 8.0, 1),
    "page": Medium(6.9, 8.5, 3),
    "slide": Medium(10.0, 15.0, 2, stroke=1.8),
}

_MEDIUM: ContextVar[Medium | None] = ContextVar("medium", default=None)


@contextmanager
def style(name: Literal["column", "page", "slide"]) -> Iterator[None]:
    """A context whose pictures are made for print: of a width, with text that can be read there.

    - `name`: "column" is 3.3 inches wide, "page" 6.9, and "slide" 10.

    No text is smaller than 7 points, and lines of a slide are broader. Pictures that are made
    inside of it have the width, whatever axes or panels they have; figures of your own get it as
    the default of matplotlib.

    >>> import pandas as pd
    >>> from geffect import plots
    >>> with plots.style("column"):
    ...     ax = plots.profile(pd.DataFrame({"step": 0, "layer": ["a", "b"], "value": [1.0, 2.0]}))
    >>> float(ax.figure.get_figwidth())
    3.3
    """
    if name not in MEDIA:
        raise ValueError(
            f"`name` should be {', '.join(map(repr, MEDIA))}. Found {name!r}. Choose one of those."
        )
    medium = MEDIA[name]
    settings = {
        **EMBEDDED,
        "figure.figsize": (medium.width, 0.62 * medium.width),
        **dict.fromkeys(MEDIUM_TEXT, medium.text),
        **dict.fromkeys(SMALL_TEXT, max(LEAST, 0.84 * medium.text)),
    }
    with mpl.rc_context(settings):
        token = _MEDIUM.set(medium)
        try:
            yield
        finally:
            _MEDIUM.reset(token)


def medium() -> Medium | None:
    """What pictures are made for, inside of `style`."""
    return _MEDIUM.get()


def strokes(**looks: Any) -> dict[str, Any]:
    """The keywords of lines and marks, as broad as they should be where the picture will stand.

    >>> with style("slide"):
    ...     strokes(color="red", linewidth=1.0, markersize=2.0)
    {'color': 'red', 'linewidth': 1.8, 'markersize': 3.6}
    """
    made_for = medium()
    factor = made_for.stroke if made_for else 1.0
    return {n: x * factor ** STROKES[n] if n in STROKES else x for n, x in looks.items()}


def is_narrow() -> bool:
    """Whether keys and scales have no room beside the data, and stand below."""
    made_for = medium()
    return made_for is not None and made_for.width < NARROW


def points(size: Literal["large", "medium", "small", "x-small"]) -> float:
    """The size of text in points: relative to that of the session, and readable."""
    return max(LEAST, float(FontProperties(size=size).get_size_in_points()))
