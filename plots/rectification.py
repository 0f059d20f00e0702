"""What a rectifier did: directions before and after, where it acted, and what the update kept."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from geffect.numbers import percent
from geffect.scores import COSINE as UNIT
from geffect.scores import Score, blocks_of, said

from .axes import dress, step_axis
from .figures import new_figure
from .fit import blocks_in, levels, once_only, require
from .frames import framed
from .heatmap import edges, heatmap
from .inks import GRU, GRU_COORDINATE, PLAIN, QUIET, UNDEFINED, Ink
from .legends import key
from .sheet import shared_key
from .style import is_narrow, points, strokes
from .words import axis_label, heading, level_headings, note
from .words import title as put_title

COSINE = Score("cosine with the retain average", UNIT)
COURSES = {
    "cosine_before": ("before", PLAIN),
    "cosine_after": ("rectified", GRU),
    "cosine_applied": ("as applied", GRU_COORDINATE),
}
MARKS = {"fired": ("fired", GRU), "violated": ("update violates", GRU_COORDINATE)}
UNMARKED = "#f2f2f2"


def rectification(table: pd.DataFrame, *, title: str | None = None) -> Figure:
    """A figure of what a rectifier did: cosines before and after, where it fired and was violated.

    - `table`: what `geffect.analysis.rectification` gives.
    - `title`: above the panels; none if left out.

    Returns the figure. Raises ValueError for another table.

    One block has lines over two rows of marks, with the share of the steps that have them, side by
    side for every retain set. Several blocks have maps, one row for every retain set. Grey is
    undefined.

    >>> from geffect.scores import stack, tidy
    >>> values = {"cosine_before": -0.4, "cosine_after": 0.0, "cosine_applied": -0.1,
    ...           "fired": 1.0, "violated": 1.0}
    >>> table = stack({name: tidy(np.array([[value]]), COSINE, steps=np.array([0]),
    ...                           blocks=["model"], by="model", against="retain")
    ...                for name, value in values.items()}, "quantity")
    >>> lines, marks = rectification(table).axes
    >>> [line.get_label() for line in lines.lines[1:]]
    ['before', 'rectified', 'as applied']
    """
    require(table, ["step", "against", "quantity", "value"])
    once_only(table, ["step", blocks_of(table), "against", "quantity"])
    wanted, found = [*COURSES, *MARKS], levels(table["quantity"])
    if not {*wanted} <= {*found}:
        raise ValueError(
            f"`table` should have the quantities {', '.join(wanted)}. Found {', '.join(found)}. "
            "Pass the table of geffect.analysis.rectification, with all that it has of a step."
        )
    figure = _lines(table) if len(blocks_in(table)) == 1 else _maps(table)
    if title:
        put_title(figure, title)
    return figure


def _lines(table: pd.DataFrame) -> Figure:
    sets = levels(table["against"])
    figure = new_figure(1.9 + 4.4 * len(sets), 3.6)
    grid = figure.subplots(
        2, len(sets), sharex="col", sharey="row", squeeze=False, height_ratios=(7, 1)
    )
    for (above, below), against in zip(grid.T, sets, strict=True):
        above.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
        # From broad to fine, so that lines are told apart where they run along each other.
        for broad, (quantity, (name, ink)) in zip((1.9, 1.3, 1.2), COURSES.items(), strict=True):
            course = _of(table, against, quantity).sort_values("step")
            above.plot(
                course["step"].to_numpy(), course["value"].to_numpy(dtype=float),
                color=ink.colour, linestyle=ink.dashes, label=name, zorder=3,
                marker="o" if len(course) <= 40 else "",
                **strokes(linewidth=broad, markersize=1.5 * broad),
            )  # fmt: skip
        for row, (quantity, (_, ink)) in enumerate(MARKS.items()):
            marks = _of(table, against, quantity)
            _mark(below, marks, [row - 0.5, row + 0.5], ink)
            below.text(
                1.01, row, _share(marks), transform=below.get_yaxis_transform(), va="center",
                fontsize=points("x-small"), color="#555555",
            )  # fmt: skip
        below.set_yticks(range(len(MARKS)), [name for name, _ in MARKS.values()])
        below.set_ylim(len(MARKS) - 0.5, -0.5)
        step_axis(below)
        for ax in (above, below):
            dress(ax, frame=ax is above)
            ax.label_outer()
        below.tick_params(left=False)
        if len(sets) > 1:
            heading(above, f"against {against}")
    axis_label(grid[0, 0].yaxis, COSINE.label)
    drawn = grid[0, -1].lines[1:]
    key(grid[0, -1], [line for line in drawn if np.isfinite(line.get_ydata()).any()])
    if is_narrow():  # below the marks, not between them and the lines
        shared_key(figure, [grid[0, -1]])
    return figure


def _maps(table: pd.DataFrame) -> Figure:
    sets, blocks = levels(table["against"]), blocks_in(table)
    tall = float(np.clip(0.17 * len(blocks), 2.4, 5.5))
    wide = 2 if is_narrow() else 4
    figure = new_figure(3.5 * wide, len(sets) * (4 // wide) * tall + 0.7)
    mapped = ("cosine_before", "cosine_after")
    cosines = said(table[table["quantity"].isin(mapped)], COSINE)
    # Further apart than usual: the label of the colour bar belongs to the panels on its left.
    grid = figure.subplots(
        len(sets) * (4 // wide), wide, sharex=True, sharey=True, squeeze=False,
        gridspec_kw={"wspace": 0.06},
    )  # fmt: skip
    for axes, against in zip(grid.reshape(len(sets), 4), sets, strict=True):
        where = f", against {against}" if len(sets) > 1 else ""
        for ax, quantity in zip(axes[:2], mapped, strict=True):
            heatmap(framed(_of(cosines, against, quantity), cosines), ax=ax)
            heading(ax, COURSES[quantity][0] + where)
        for ax, (quantity, (name, ink)) in zip(axes[2:], MARKS.items(), strict=True):
            marks = _of(table, against, quantity)
            _mark(ax, marks, np.arange(len(blocks) + 1) - 0.5, ink)
            step_axis(ax)
            dress(ax, frame=False)
            heading(ax, name + where)
            note(ax, _share(marks))
        axes[0].collections[0].colorbar.remove()  # that of the next panel is for both
    level_headings(grid)
    for ax in grid.flat:
        ax.label_outer(remove_inner_ticks=True)
    return figure


def _of(table: pd.DataFrame, against: str, quantity: str) -> pd.DataFrame:
    return table[(table["against"] == against) & (table["quantity"] == quantity)]


def _mark(ax: Axes, marks: pd.DataFrame, rows: Sequence[float] | np.ndarray, ink: Ink) -> None:
    """A cell a block and step: in colour where the value is 1."""
    grid = marks.pivot(index=blocks_of(marks), columns="step", values="value")
    grid = grid.reindex(blocks_in(marks))
    ax.pcolormesh(
        edges(grid.columns.to_numpy(dtype=float)),
        rows,
        np.ma.masked_invalid(grid.to_numpy(dtype=float)),
        cmap=ListedColormap([UNMARKED, ink.colour]).with_extremes(bad=UNDEFINED),
        vmin=0.0,
        vmax=1.0,
        rasterized=True,
    )


def _share(marks: pd.DataFrame) -> str:
    share = marks["value"].mean()
    return "undefined" if np.isnan(share) else percent(share)
