"""Values as lines: over the depth of the network, and over the steps."""

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes

from geffect.scores import blocks_of, score_of

from .fit import all_levels, blocks_in, constants, names_in, require, short, told_apart
from .style import (
    Frame,
    Ink,
    depth_colours,
    drawn,
    dress,
    heading,
    inks,
    key,
    longest,
    new_axes,
    note,
    rate,
    step_axis,
    thinned,
    towers_apart,
    value_axis,
)


def profile(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Median over the steps at each block, input on the left; the band holds the middle half.

    Of a score that is 0 or 1 it is the rate: in how many of the steps it is 1, without a band.

    - `table`: `step`, one column of blocks, `value`, and at most two columns that tell rows apart.
    - `ax`: the axes to draw on; new ones if left out.

    Returns the axes. Raises ValueError for a table of more than
    one panel.

    Each effect or run has a line: the first column that tells rows apart gives the colour, the last
    the dashes. A gap separates the towers of a model.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [-1.0, 2.0]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> ax = profile(table, ax=Figure().subplots())
    >>> ax.lines[-1].get_ydata().tolist()
    [-2.0, 1.5]
    """
    several = told_apart(table, most=2)
    block, frame = blocks_of(table), Frame.of(table)
    names = short(frame.blocks)
    ax = ax or new_axes(height=3.0 + 0.04 * longest(names))
    value_axis(ax, table)
    handles = []
    at = range(len(frame.blocks))
    rates = score_of(table).is_rate
    for name, ink, part in lines_of(table, several):
        values = part.groupby(block, observed=True)["value"]
        of_steps = 100 * values.mean() if rates else values.median()
        middle = of_steps.reindex(frame.blocks).to_numpy(dtype=float)
        marker = "o" if len(frame.blocks) <= 40 else ""
        handles += ax.plot(
            at, middle, color=ink.colour, linestyle=ink.dashes, linewidth=1.3, label=name,
            marker=marker, markersize=3, zorder=3,
        )  # fmt: skip
        if not rates:
            low, high = (
                values.quantile(share).reindex(frame.blocks).to_numpy(dtype=float)
                for share in (0.25, 0.75)
            )
            ax.fill_between(at, low, high, color=ink.colour, alpha=0.16, linewidth=0, zorder=2)
    towers_apart(ax.axvline, frame.blocks)
    places = thinned(len(frame.blocks), most=14)
    ax.set_xticks(
        places,
        [drawn(names[place]) for place in places],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_xlim(-0.5, len(frame.blocks) - 0.5)
    ax.set_xlabel(drawn(f"{block}, from input to output"), fontsize="medium")
    dress(ax)
    heading(ax, constants(table))
    if table["step"].nunique() > 1:
        note(ax, "rate over steps" if rates else "median and quartiles over steps")
    if several:
        key(ax, handles)
    return ax


def trajectory(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The value over the steps: a line for each block, or of one block for each effect or run.

    Of a score that is 0 or 1 there is no line for a block, but one for their rate at each step.

    - `table`: `step`, one column of blocks and `value`; of one block also columns that tell rows
      apart.
    - `ax`: the axes to draw on; new ones if left out.

    Returns the axes. Raises ValueError for a table of more than
    one panel.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [-1.0, 2.0]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> ax = trajectory(table, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['embedding', 'head']
    """
    require(table, ["step", "value"])
    present = blocks_in(table)
    rates = score_of(table).is_rate
    several = told_apart(table, most=0 if len(present) > 1 and not rates else 2)
    if len(present) > 1 and not rates:
        block, colours = blocks_of(table), depth_colours(Frame.of(table).blocks)
        lines = [
            (label, Ink(colours[name]), table[table[block] == name])
            for name, label in zip(present, short(present), strict=True)
        ]
    else:
        lines = list(lines_of(table, several))
    ax = ax or new_axes()
    value_axis(ax, table)
    few = len(lines) <= 12
    marker = "o" if few and table["step"].nunique() <= 40 else ""
    # An undefined value at either end is no reason to hide that its step was captured.
    ax.update_datalim([(table["step"].min(), 0.0), (table["step"].max(), 0.0)])
    handles = []
    for name, ink, part in lines:
        ordered = part.groupby("step")["value"].mean()
        handles += ax.plot(
            ordered.index.to_numpy(), (100 if rates else 1) * ordered.to_numpy(dtype=float),
            color=ink.colour, linestyle=ink.dashes, linewidth=1.2 if few else 0.7, label=name,
            marker=marker, markersize=2, zorder=3,
        )  # fmt: skip
    step_axis(ax)
    dress(ax)
    block_alone = present if len(present) == 1 else []
    heading(ax, ", ".join(filter(None, [constants(table), *block_alone])))
    if rates:
        note(ax, rate(table) if block_alone else f"of the blocks; {rate(table)}")
    if len(lines) > 1:
        key(ax, [handles[place] for place in thinned(len(handles), most=14)])
    return ax


def lines_of(
    table: pd.DataFrame, several: Sequence[str]
) -> Iterator[tuple[str, Ink, pd.DataFrame]]:
    """Name, ink and rows of each line: coloured by the first column, dashed by the last."""
    if not several:
        names = [held[0] for held in names_in(table).values()] or [""]
        yield ", ".join(names), inks(names)[names[0]], table
        return
    colours, dashes = (inks(all_levels(table[column])) for column in (several[0], several[-1]))
    for key_of, part in table.groupby(list(several), observed=True, sort=False):
        names = list(map(str, key_of))
        yield ", ".join(names), Ink(colours[names[0]].colour, dashes[names[-1]].dashes), part
