"""Values as lines: over the depth of the network, and over the steps."""

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.scores import blocks_of, score_of, scores_in

from .conventions import Asked, coloured, picture
from .fit import all_levels, blocks_in, constants, levels, names_in, require, short, told_apart
from .style import (
    SIDE,
    Ink,
    all_blocks,
    axis_label,
    depth_colours,
    drawn,
    dress_sides,
    heading,
    inks,
    key,
    longest,
    new_axes,
    note,
    points,
    rate,
    step_axis,
    thinned,
    towers_apart,
    units_of_sides,
    value_axes,
)
from .ticks import BlockTicks


@picture(Line2D)
def profile(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """Median over the steps at each block, input on the left; the band holds the middle half.

    Of a score that is 0 or 1 it is the rate: in how many of the steps it is 1, without a band.

    - `table`: `step`, one column of blocks, `value`, and at most two columns that tell rows apart.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of more than
    one panel.

    Each effect or run has a line: the first column that tells rows apart gives the colour, the last
    the dashes. A gap separates the towers of a model. Of two units, such as those of gradients and
    of updates, each has a scale: the second on the right, with zero at the same height.

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
    block, blocks = blocks_of(table), all_blocks(table)
    names = short(blocks)
    units = units_of_sides(table)
    spare = SIDE * (len(units) - 1)
    lines = list(lines_of(table, several, asked))
    tall = 3.0 + 0.04 * longest(names)
    ax = ax or new_axes(5.6 + 2 * spare, tall, named=len(lines) * len(units))
    sides = value_axes(ax, table, units)
    handles = []
    at = range(len(blocks))
    for name, ink, part in lines:
        score = score_of(part)
        side = sides[score.unit]
        values = part.groupby(block, observed=True)["value"]
        of_steps = 100 * values.mean() if score.is_rate else values.median()
        middle = of_steps.reindex(blocks).to_numpy(dtype=float)
        marker = "o" if len(blocks) <= 40 else ""
        handles += side.plot(
            at, middle, label=name if side is ax else f"{name} (right)",
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.3, marker=marker,
                         markersize=3, zorder=3),
        )  # fmt: skip
        if not score.is_rate:
            low, high = (
                values.quantile(share).reindex(blocks).to_numpy(dtype=float)
                for share in (0.25, 0.75)
            )
            side.fill_between(
                at, low, high, color=handles[-1].get_color(), alpha=0.16, linewidth=0, zorder=2
            )
    towers_apart(ax.axvline, blocks)
    BlockTicks.put(ax.xaxis, [*map(drawn, names)], points("small"), most=14)
    for label in ax.get_xticklabels():  # those of ticks that come with more room follow the first
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(blocks) - 0.5)
    axis_label(ax.xaxis, f"{block}, from input to output")
    dress_sides(sides.values())
    heading(ax, constants(table))
    if table["step"].nunique() > 1:
        note(ax, "rate over steps" if score.is_rate else "median and quartiles over steps")
    if several:
        key(ax, handles, offset=spare)
    return ax


@picture(Line2D)
def trajectory(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """The value over the steps: a line for each block, or of one block for each effect or run.

    Of a score that is 0 or 1 there is no line for a block, but one for their rate at each step.

    - `table`: `step`, one column of blocks and `value`; of one block also columns that tell rows
      apart.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

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
    rates = all(score.is_rate for score in scores_in(table))
    several = told_apart(table, most=0 if len(present) > 1 and not rates else 2)
    if len(present) > 1 and not rates:
        block, everywhere = blocks_of(table), all_blocks(table)
        colours = depth_colours(everywhere)
        if asked.palette is not None:
            colours = coloured(everywhere, asked.palette)
        labels = dict(zip(present, short(present), strict=True))
        lines = [
            (labels[name], Ink(colours[name]), table[table[block] == name])
            for name in asked.order(present, everywhere)
        ]
    else:
        lines = list(lines_of(table, several, asked))
    units = units_of_sides(table)
    spare = SIDE * (len(units) - 1)
    ax = ax or new_axes(5.6 + 2 * spare, named=len(lines) * len(units))
    sides = value_axes(ax, table, units)
    few = len(lines) <= 12
    marker = "o" if few and table["step"].nunique() <= 40 else ""
    # An undefined value at either end is no reason to hide that its step was captured.
    ax.update_datalim([(table["step"].min(), 0.0), (table["step"].max(), 0.0)])
    handles = []
    for name, ink, part in lines:
        ordered = part.groupby("step")["value"].mean()
        side = sides[score_of(part).unit]
        handles += side.plot(
            ordered.index.to_numpy(),
            (100 if score_of(part).is_rate else 1) * ordered.to_numpy(dtype=float),
            label=name if side is ax else f"{name} (right)",
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.2 if few else 0.7,
                         marker=marker, markersize=2, zorder=3),
        )  # fmt: skip
    step_axis(ax)
    dress_sides(sides.values())
    block_alone = present if len(present) == 1 else []
    heading(ax, ", ".join(filter(None, [constants(table), *block_alone])))
    if rates:
        note(ax, rate(table) if block_alone else f"of the blocks; {rate(table)}")
    if len(lines) > 1:
        shown = [handles[index] for index in thinned(len(handles), most=14)]
        key(ax, shown, offset=spare)
    return ax


def lines_of(
    table: pd.DataFrame, several: Sequence[str], asked: Asked
) -> Iterator[tuple[str, Ink, pd.DataFrame]]:
    """Name, ink and rows of each line: coloured by the first column, dashed by the last."""
    if not several:
        names = [held[0] for held in names_in(table).values()] or [""]
        yield ", ".join(names), asked.inks(names)[names[0]], table
        return
    hue, mark = several[0], several[-1]
    known = all_levels(table[hue])
    colours, dashes = asked.inks(known), inks(all_levels(table[mark]))
    parts = {
        tuple(map(str, key_of)): part
        for key_of, part in table.groupby(list(several), observed=True, sort=False)
    }
    for name in asked.order(levels(table[hue]), known):
        for told, part in parts.items():
            if told[0] == name:
                yield ", ".join(told), Ink(colours[name].colour, dashes[told[-1]].dashes), part
