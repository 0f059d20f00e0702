"""Cosines over the band in which chance alone would put them."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.scores import blocks_of

from .axes import dress, step_axis, towers_apart, value_axis
from .conventions import Asked, picture
from .figures import new_axes
from .fit import blocks_in, constants, require, short, told_apart
from .inks import PLAIN, UNDEFINED
from .legends import key
from .style import points
from .ticks import BlockTicks
from .words import drawn, heading, longest, note

COSINE, FLOOR = "cosine", "noise"


@picture(Line2D)
def noise_floor(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """The cosine of two gradients over the band in which those of noise alone lie.

    - `table`: `step`, one column of blocks, `value` and `floor`, as `geffect.analysis.noise_floor`
      gives them.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`. The names of the colours are "cosine" and "noise".

    Returns the axes. Raises ValueError for a table of more than one panel.

    One block is drawn over the steps. Of several blocks the medians over the steps are drawn, from
    input to output. A cosine inside of the band is no conflict.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": [0, 1], "model": "model", "value": [-0.4, 0.0],
    ...                       "floor": [0.1, 0.2], "score": "cosine", "unit": "cosine"})
    >>> ax = noise_floor(table, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['cosine', 'noise']
    """
    require(table, ["step", "value", "floor"])
    told_apart(table, most=0)
    block, blocks = blocks_of(table), blocks_in(table)
    names = short(blocks)
    known = [COSINE, FLOOR]
    colours = {COSINE: PLAIN.colour, FLOOR: UNDEFINED}
    if asked.palette is not None:
        colours = {name: ink.colour for name, ink in asked.inks(known).items()}
    ax = ax or new_axes(5.6, 3.2 + 0.04 * longest(names) * (len(blocks) > 1))
    value_axis(ax, table)
    over = "step" if len(blocks) == 1 else block
    middle = table.groupby(over, observed=True)[["value", "floor"]].median()
    middle = middle.sort_index() if len(blocks) == 1 else middle.reindex(blocks)
    at = middle.index.to_numpy() if len(blocks) == 1 else np.arange(len(blocks))
    value, floor = (middle[name].to_numpy(dtype=float) for name in ("value", "floor"))
    handles: dict[str, Line2D] = {}
    order = asked.order(known)
    if FLOOR in order:
        ax.fill_between(at, -floor, floor, color=colours[FLOOR], alpha=0.5, linewidth=0, zorder=2)
        handles[FLOOR] = Line2D([], [], color=colours[FLOOR], alpha=0.5, linewidth=7, label=FLOOR)
    if COSINE in order:
        (handles[COSINE],) = ax.plot(
            at, value, label=COSINE,
            **asked.look(color=colours[COSINE], linewidth=1.2, zorder=3,
                         marker="o" if len(at) <= 40 else "", markersize=2.6),
        )  # fmt: skip
    if len(blocks) == 1:
        step_axis(ax)
    else:
        towers_apart(ax.axvline, blocks)
        BlockTicks.put(ax.xaxis, [*map(drawn, names)], points("small"), most=14)
        ax.set_xlim(-0.5, len(blocks) - 0.5)
        ax.set_xlabel(drawn(f"{block}, from input to output"), fontsize=points("medium"))
    dress(ax)
    heading(ax, constants(table))
    several = len(blocks) > 1 and table["step"].nunique() > 1
    note(ax, "medians over the steps" if several else "")
    key(ax, [handles[name] for name in order])
    return ax
