"""Axes: the scale and label of values and steps, spines, and what parts towers."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from geffect.places import tower_in
from geffect.scores import score_of

from .frames import FRAMES, LINEAR_SHARE, Frame, are_above_zero, of_unit
from .inks import QUIET
from .style import points
from .ticks import Decades, log_scale
from .words import axis_label


def value_axis(ax: Axes, table: pd.DataFrame) -> None:
    """Gives y the label, scale and limits of the table's score, and a line at zero.

    Weights have a logarithmic scale, where none of them is zero.

    Comes before the data: margins are those of the scale on which the data are added.
    """
    score, frame = score_of(table), Frame.of(table)
    axis_label(ax.yaxis, score.axis)
    if are_above_zero(table):
        log_scale(ax)
        return
    ax.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    if score.scale == "symlog":
        ax.set_yscale("symlog", linthresh=frame.threshold, linscale=LINEAR_SHARE)
        Decades.put(ax.yaxis, frame.threshold, points("small"))
        # Zero alone would be on view where all values are near it.
        ax.update_datalim([(0.0, -frame.threshold), (0.0, frame.threshold)], updatex=False)
    if score.limits:
        low, high = (100 * limit if score.is_rate else limit for limit in score.limits)
        margin = 0.03 * (high - low)  # a line that runs along the limit keeps its full width
        ax.set_ylim(low - margin, high + margin)


def value_axes(ax: Axes, table: pd.DataFrame, units: Sequence[str]) -> dict[str, Axes]:
    """The axes of each unit: y on the left, and of a second one on the right.

    Comes before the data, as `value_axis` does.
    """
    if len(units) == 1:
        value_axis(ax, table)
        return {units[0]: ax}
    sides = {unit: ax.twinx() if index else ax for index, unit in enumerate(units)}
    for unit, side in sides.items():
        own = of_unit(table, unit)
        value_axis(side, own)
        if FRAMES in table.attrs:  # panels whose sides are not joined have the same limits
            reach = 1.2 * Frame.of(own).limit
            side.set_ylim(-reach, reach)
    return sides


def dress_sides(sides: Iterable[Axes]) -> None:
    """Dresses the axes of `value_axes` when they have their data: zero is at one height."""
    left, *others = sides
    dress(left)
    for right in others:
        dress(right)
        right.spines["right"].set(visible=True, linewidth=0.6)
        right.spines["left"].set_visible(False)
    for side in (left, *others) if others else ():
        reach = max(map(abs, side.get_ylim()))
        side.set_ylim(-reach, reach)


def step_axis(ax: Axes) -> None:
    """Gives x its label and whole-numbered ticks."""
    axis_label(ax.xaxis, "optimizer step")
    ax.xaxis.set_major_locator(
        MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )


def dress(ax: Axes, *, frame: bool = True) -> None:
    """Takes away the spines that carry no ticks, or all of them, and thins what stays."""
    for side in ("top", "right") if frame else ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)
    ax.tick_params(width=0.6, length=2.5, labelsize=points("small"))
    ax.tick_params(which="minor", width=0.4, length=1.5, labelsize=points("small"))


def towers_apart(line: Callable[..., Line2D], blocks: Sequence[str]) -> None:
    """Separates the blocks of different towers, by `ax.axvline` or `ax.axhline` between them."""
    towers = list(map(tower_in, blocks))
    for index, (before, after) in enumerate(pairwise(towers), start=1):
        if before != after:
            line(index - 0.5, color="white", linewidth=5, zorder=4)
            line(index - 0.5, color=QUIET, linewidth=0.6, zorder=5)
