"""Figures: their size in the medium, whom they belong to, and the room that axes have on them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.drafts import write_whole

from .style import EMBEDDED, is_narrow, medium


class Picture(Figure):
    """A figure that saves its text as text."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with mpl.rc_context(EMBEDDED):
            super().savefig(*args, **kwargs)


def new_axes(width: float = 5.6, height: float = 3.4, *, named: int = 4) -> Axes:
    """Axes alone on a new figure, which reserves room for whatever is outside of them.

    `named` is how many lines a key has: in a narrow medium it stands below.
    """
    figure = pyplot.figure(
        figsize=_size(width, height, named), layout="constrained", FigureClass=Picture
    )
    return figure.subplots()


def rows_and_columns(panels: int, most: int) -> tuple[int, int]:
    """How many rows and columns panels stand in: at most so many, and what the medium takes.

    >>> rows_and_columns(4, 3)
    (2, 2)
    """
    made_for = medium()
    rows = -(-panels // (min(most, made_for.abreast) if made_for else most))
    return rows, -(-panels // rows)


def new_figure(width: float, height: float) -> Figure:
    """A figure that is the caller's alone: to be saved, or returned by a notebook cell."""
    figure = pyplot.figure(figsize=_size(width, height), layout="constrained", FigureClass=Picture)
    # Held by pyplot, a notebook would show it a second time and a script would pile them up;
    # made without pyplot, the first one of a notebook would not be shown at all.
    pyplot.close(figure)
    return figure


def save(figure: Figure, path: Path, *, dpi: float) -> None:
    """Write a figure, as the kind that its name ends in; the file is there whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=dpi)
    write_whole(path, drawn.getvalue())


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes are on, from now on the caller's alone."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    pyplot.close(figure)  # which pyplot would keep
    return figure


def _size(width: float, height: float, named: int = 0) -> tuple[float, float]:
    """The size in inches: as it is asked for, or of the medium's width and about as upright."""
    if (made_for := medium()) is None:
        return width, height
    below = 0.15 + 0.08 * min(named, 14) if is_narrow() else 0.0
    return made_for.width, height * (1 + made_for.width / width) / 2 + below


def height_of(ax: Axes) -> float:
    """About how tall axes are, in inches, with what else the layout may put there."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    height = float(figure.get_figheight() * ax.get_position().height)
    return 0.85 * height if medium() else height


def width_of(ax: Axes) -> float:
    """About how wide axes are, in inches, before anything is laid out."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    width = float(figure.get_figwidth() * ax.get_position().width)
    return 0.85 * width if medium() and width < 4 else width  # labels beside it take their share
