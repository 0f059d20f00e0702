"""Keys and colour bars: beside the data, or below where that has no room."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2DBase, ScaledTranslation
from numpy.typing import NDArray

from .figures import height_of, width_of
from .style import is_narrow, medium, points
from .words import LONGEST, drawn, wrapped

SIDE = 0.85  # inches that a scale on the right takes, with its label
LEGEND: dict[str, Any] = {
    "frameon": False, "handlelength": 2.6, "columnspacing": 1.4, "alignment": "left"
}  # fmt: skip


def colour_bar(ax: Axes, mesh: ScalarMappable, label: str, also: str = "") -> Colorbar:
    """The scale of the colours: on the right, or where that has no room below.

    What is said `also` stands on a line of its own.
    """
    assert ax.figure is not None
    is_below = is_narrow()
    place = {"location": "bottom", "aspect": 34} if is_below else {"aspect": 28, "fraction": 0.06}
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, **place)
    room = 34
    if medium():
        length = width_of(ax) if is_below else height_of(ax)
        room = min(LONGEST if is_below else 34, int(72 * length / (0.56 * points("medium"))))
    axis = bar.ax.xaxis if is_below else bar.ax.yaxis
    lines = [wrapped(label, max(12, room)), also]
    axis.set_label_text("\n".join(filter(None, lines)), fontsize=points("medium"))
    if is_below:
        bar.locator = MaxNLocator(nbins=4, steps=[1, 2, 5, 10])
        bar.update_ticks()
    bar.ax.minorticks_off()
    bar.ax.tick_params(width=0.6, length=2.5, labelsize=points("small"))
    bar.outline.set_visible(False)
    return bar


def key(ax: Axes, handles: Sequence[Artist], *, offset: float = 0.0, title: str = "") -> Legend:
    """The legend of the handles: `offset` inches to the right of the data, or where that has no
    room below it."""
    assert ax.figure is not None
    labels = [drawn(handle.get_label()) for handle in handles]
    if is_narrow():
        place: dict[str, Any] = {
            "bbox_to_anchor": (0.0, -0.5),
            "bbox_transform": _Below(ax),
            "ncols": abreast([*labels, title], 72 * width_of(ax)),
        }
    else:
        to_the_right = ScaledTranslation(offset, 0, ax.figure.dpi_scale_trans)
        place = {"bbox_to_anchor": (1.01, 1.0), "bbox_transform": ax.transAxes + to_the_right}
    legend = ax.legend(
        handles=list(handles),
        labels=["" for _ in handles],
        loc="upper left",
        borderaxespad=0.0,
        title=title or None,
        **LEGEND,
        **place,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_fontsize(points("small"))
    write_labels(legend, labels)
    return legend


def abreast(labels: Sequence[str], room: float) -> int:
    """How many labels of a legend stand side by side in so many points.

    >>> abreast(["unlearning", "retaining"], 240.0)
    2
    """
    size = points("small")
    wide = (2.6 + 0.8 + 1.4 + 0.62 * max(map(len, labels), default=0)) * size
    return max(1, min(len(labels), int(room / wide)))


class _Below(Affine2DBase):
    """Points from the lower left corner of axes with all that is written below them."""

    def __init__(self, ax: Axes) -> None:
        super().__init__()
        self._ax = ax
        self.set_children(ax.transAxes)

    def get_matrix(self) -> NDArray[np.float64]:
        figure = self._ax.get_figure(root=True)
        assert figure is not None
        inside, scale = self._ax.bbox, figure.dpi / 72
        written = self._ax.xaxis.get_tightbbox() if self._ax.axison else None
        low = inside.y0 if written is None else min(inside.y0, written.y0)
        self._invalid = 0  # or nobody would be told when the axes move again
        return np.array([[scale, 0.0, inside.x0], [0.0, 10 * scale, low], [0.0, 0.0, 1.0]])


def write_labels(legend: Legend, labels: Iterable[str]) -> None:
    """Give a legend its labels, also those that matplotlib leaves out: they begin with `_`."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
