"""Blocks by steps, in colour."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from geffect.scores import blocks_of, score_of

from .conventions import Asked, picture
from .fit import constants, short, told_apart
from .style import (
    Frame,
    axis_label,
    colour_bar,
    colours_of,
    decade_format,
    decades,
    drawn,
    dress,
    few_decades,
    heading,
    longest,
    new_axes,
    note,
    points,
    rate,
    step_axis,
    towers_apart,
)
from .ticks import BlockTicks


@picture(QuadMesh, by="cmap")
def heatmap(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A cell a block and step: input on top, zero white, grey where the score is undefined.

    - `table`: `step`, one column of blocks and `value`, one row for each step and block.
    - `ax`, `cmap`, `xlim`, `ylim`, `title`, keywords of a mesh: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of more than
    one panel.

    A column reaches half way to the captured steps beside it, so that x is time. A line separates
    the towers of a model.

    >>> from matplotlib.figure import Figure
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [2.0, np.nan]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> ax = heatmap(table, ax=Figure().subplots())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['embedding', 'head']
    """
    told_apart(table, most=0)
    block, frame = blocks_of(table), Frame.of(table)
    grid = table.pivot(index=block, columns="step", values="value").reindex(frame.blocks)
    names = short(frame.blocks)
    cells = np.ma.masked_invalid(grid.to_numpy(dtype=float))
    if ax is None:
        tall = float(np.clip(0.17 * len(frame.blocks), 2.8, 5.5))
        ax = new_axes(5.0 + 0.06 * longest(names), tall)
    cmap, norm = colours_of(table)
    mesh = ax.pcolormesh(
        edges(grid.columns.to_numpy(dtype=float)),
        np.arange(len(frame.blocks) + 1) - 0.5,
        cells,
        # Thousands of vector cells show seams and make a heavy file.
        **asked.mesh(cmap, norm, rasterized=True),
    )
    ax.set_ylim(len(frame.blocks) - 0.5, -0.5)
    towers_apart(ax.axhline, frame.blocks)
    BlockTicks.put(ax.yaxis, [*map(drawn, names)], points("small"))
    axis_label(ax.yaxis, block)
    step_axis(ax)
    dress(ax, frame=False)
    heading(ax, constants(table))
    score = score_of(table)
    if score.is_rate:
        note(ax, rate(table))

    undefined = "(grey: undefined)" if np.ma.is_masked(cells) else ""
    bar = colour_bar(ax, mesh, score.full, undefined)
    if isinstance(mesh.norm, SymLogNorm):
        ticks = decades(frame) if bar.orientation == "vertical" else few_decades(frame)
        bar.set_ticks(FixedLocator(ticks))
        bar.long_axis.set_major_formatter(decade_format())
        bar.ax.minorticks_off()
    if score.is_rate:
        bar.set_ticks([0.25, 0.75], labels=["no", "yes"])
        bar.ax.tick_params(length=0)
    return ax


def edges(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half way between neighbours; the outer cells are symmetric about their centres.

    >>> edges(np.array([0.0, 2.0, 6.0]))
    array([-1.,  1.,  4.,  8.])
    """
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[:-1] + centres[1:]) / 2
    return np.array([2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]])
