"""Blocks by steps, in colour."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from geffect.scores import blocks_of, score_of
from geffect.spans import largest_of_spans, rates_of_spans

from .axes import dress, step_axis, towers_apart
from .conventions import Asked, picture
from .figures import new_axes
from .fit import SEED, constants, seed_in, short, told_apart
from .frames import Frame, colours_of
from .inks import QUIET, RATE
from .legends import colour_bar
from .long import each, spans_of
from .style import points
from .ticks import BlockTicks, Decades
from .words import axis_label, drawn, heading, longest, note, rate

MOST_MARKS, RATES = 120, 40
"""Steps up to which zeros and ones are cells; of more, the spans that each have a rate."""


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
    seeds = table[SEED].nunique() if seed_in(table) else 0
    if seeds:
        keys = ["step", blocks_of(table)]
        table = table.assign(value=table.groupby(keys, observed=True)["value"].transform("mean"))
        table = table.drop_duplicates(keys)
    block, frame = blocks_of(table), Frame.of(table)
    grid = table.pivot(index=block, columns="step", values="value").reindex(frame.blocks)
    names, score = short(frame.blocks), score_of(table)
    if ax is None:
        tall = float(np.clip(0.17 * len(frame.blocks), 2.8, 5.5))
        ax = new_axes(5.0 + 0.06 * longest(names), tall)
    steps = grid.columns.to_numpy(dtype=float)
    values = grid.where(np.isfinite(grid)).to_numpy(dtype=float)
    apart, said = edges(steps), []
    if seeds:
        said.append(f"mean of {seeds} seeds")
    if score.is_rate:
        said.append(rate(table))
    if score.is_rate and len(steps) > MOST_MARKS:
        starts, values = rates_of_spans(steps, values, RATES)
        apart = np.append(starts - 0.5, apart[-1])
        said.append(f"rate of {each(len(steps), len(starts))}")
    elif len(steps) > spans_of(ax):
        starts, values = largest_of_spans(steps, values, spans_of(ax))
        apart = np.append(starts - 0.5, apart[-1])
        said.append(f"of {each(len(steps), len(starts))} the largest")
    cells = np.ma.masked_invalid(values)
    are_rates = score.is_rate and not {*np.unique(cells.compressed())} <= {0.0, 1.0}
    cmap, norm = (RATE, Normalize(0.0, 1.0)) if are_rates else colours_of(table)
    mesh = ax.pcolormesh(
        apart,
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
    if said:
        note(ax, "; ".join(said))
    undefined = "(grey: undefined)" if np.ma.is_masked(cells) else ""
    bar = colour_bar(ax, mesh, score.axis if are_rates else score.full, undefined)
    if isinstance(mesh.norm, SymLogNorm):
        Decades.put(bar.long_axis, frame.threshold, points("small"))
    if are_rates:
        bar.long_axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    elif score.is_rate:
        bar.set_ticks([0.25, 0.75], labels=["no", "yes"])
        bar.ax.tick_params(length=0)
        bar.outline.set(visible=True, edgecolor=QUIET, linewidth=0.6)  # "no" is as light as paper
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
