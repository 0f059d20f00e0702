"""Several panels on one figure, on the same scales."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geffect.scores import LEVEL, blocks_of, in_common

from .figures import new_figure, rows_and_columns
from .fit import blocks_in, constants, levels, names_in, require, short, told_apart
from .frames import framed
from .heatmap import heatmap
from .legends import LEGEND, SIDE, abreast, write_labels
from .lines import profile, trajectory
from .style import is_narrow, medium, points
from .words import heading, level_headings, longest
from .words import title as put_title

TALLEST = 9.0
"""Inches of a page that a picture may take."""

LOWEST = 1.4
"""Inches of a panel, with what is written around it, in which something is read."""


def facets(
    table: pd.DataFrame,
    plot: Callable[..., Axes],
    by: str,
    *,
    columns: int = 3,
    title: str | None = None,
    **keywords: Any,
) -> Figure:
    """A figure with a panel for each name in the column `by`, all of one unit on one scale.

    - `table`: a score table that names its panels in the column `by`.
    - `plot`: draws one panel, such as `heatmap` or `trajectory`.
    - `columns`: panels side by side, at most.
    - `title`: above the panels, in the place of what all of them are of.
    - `keywords`: go to `plot`, such as a palette.

    Returns the figure. Raises ValueError for a table without the column or without rows.

    >>> import numpy as np
    >>> from geffect.scores import Score, stack, tidy
    >>> one = tidy(np.array([[-3.0], [2.0]]), Score("G-effect", "nats"),
    ...            steps=np.array([0, 5]), blocks=["model"], by="model")
    >>> figure = facets(stack({"ga": one, "npo": one}, "run"), trajectory, "run")
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['ga', 'npo']
    """
    require(table, [by])
    names = levels(table[by])
    tall, wide = rows_and_columns(len(names), columns)
    units = max(len(units_in(table[table[by].astype(str) == name])) for name in names)
    further = max(units - 1, 0)  # scales on the right of each panel
    figure = new_figure((2.9 + 2 * SIDE * further) * wide + 1.4, (2.7 + 0.6 * further) * tall + 0.5)
    if medium():  # panels are less tall before they stand on two pages
        least = LOWEST * tall
        figure.set_figheight(min(figure.get_figheight(), max(TALLEST, least)))
    # A colour belongs to a name; categories keep it where a panel lacks some of the names.
    kept = {
        column: pd.Categorical(table[column].astype(str), those, ordered=True)
        for column, those in names_in(table).items()
    }
    whole = table.assign(**kept)
    panels: list[Axes] = []
    scaled: dict[tuple[str, ...], Axes] = {}  # the first panel of each unit
    for index, name in enumerate(names):
        part = whole[whole[by].astype(str) == name]
        first = panels[0] if panels else None
        # With a side for each of two units panels are not joined: their limits are the same.
        alike = scaled.get(units_in(part)) if len(units_in(part)) < 2 else None
        ax = figure.add_subplot(tall, wide, index + 1, sharex=first, sharey=alike)
        plot(framed(part, whole), ax=ax, **keywords)
        heading(ax, name)
        scaled.setdefault(units_in(part), ax)
        panels.append(ax)
    for index, ax in enumerate(panels):
        if index + wide < len(panels):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        if index % wide and ax.get_shared_y_axes().joined(ax, panels[index - 1]):
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
    shared_key(figure, panels)
    # A bar stands on the right of its row, and one that stands below them below them all.
    rows = [panels] if is_narrow() else [panels[row * wide :][:wide] for row in range(tall)]
    keep_once(ax for row in rows for ax in reversed(row))
    level_headings(panels[row * wide :][:wide] for row in range(tall))
    # What the panels are named by stands above each, also where there is but one.
    put_title(figure, constants(table.drop(columns=by)) if title is None else title)
    return figure


def sheet(table: pd.DataFrame, *, title: str | None = None) -> Figure:
    """A figure with a row for each effect: blocks by steps, profile over depth, course in time.

    - `table`: a score table by step and block, with no more than one column of effects or runs.
    - `title`: above the panels, in the place of what all of them are of.

    Returns the figure. Raises ValueError for a table that does not fit.

    >>> import numpy as np
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [2.0, 4.0]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> sheet(table).get_suptitle()
    'G-effect (nats), by layer'
    """
    several = told_apart(table, most=1)
    rows = (
        [part for _, part in table.groupby(several, observed=True, sort=False)]
        if several
        else [table]
    )
    long = longest(short(blocks_in(table)))
    made_for = medium()
    if made_for and is_narrow():
        figure = new_figure(made_for.width, 3 * len(rows) * 2.0)
        grid = figure.subplots(3 * len(rows), 1).reshape(len(rows), 3)
    else:
        figure = new_figure(12.0 + 0.12 * long, 2.9 * len(rows) + 0.5 + 0.04 * long)
        grid = figure.subplots(
            len(rows), 3, sharex="col", squeeze=False, width_ratios=(1.2, 1.0, 1.1)
        )
        if made_for:  # what is written around a panel takes its share of the height
            figure.set_figheight(len(rows) * (0.8 + 0.2 * made_for.text))
    scaled: dict[tuple[str, ...], NDArray[np.object_]] = {}  # the first row of each unit
    for axes, part in zip(grid, rows, strict=True):
        first = scaled.setdefault(units_in(part), axes)
        for plot, ax, alike in zip((heatmap, profile, trajectory), axes, first, strict=True):
            if ax is not alike:
                ax.sharey(alike)
            plot(framed(part.drop(columns=LEVEL, errors="ignore"), table), ax=ax)
    if not is_narrow():
        for ax in grid[:-1].flat:
            ax.set_xlabel("")
        for maps, profiles, courses in grid:  # what a value is stands once a row
            said = profiles.get_ylabel().split()
            courses.set_ylabel("")
            if (bar := maps.collections[0].colorbar) and bar.ax.get_ylabel().split() == said:
                bar.set_label("")
    if made_for:
        shared_key(figure, grid[:, 2], below=True)
    keep_once(grid[:, 2])
    level_headings(grid)
    level = levels(table[LEVEL]) if LEVEL in table else []
    by = ": ".join([f"by {blocks_of(table)}", *level])
    put_title(figure, ", ".join(filter(None, [in_common(table), by])) if title is None else title)
    return figure


def units_in(table: pd.DataFrame) -> tuple[str, ...]:
    """The units of the values, none where the table does not say.

    >>> units_in(pd.DataFrame({"value": [1.0], "score": ["G-effect"], "unit": ["nats"]}))
    ('nats',)
    """
    return tuple(levels(table["unit"])) if "unit" in table else ()


def shared_key(figure: Figure, panels: Iterable[Axes], *, below: bool = False) -> None:
    """One legend for the whole figure in the place of those of its panels.

    It stands on the right, or `below`, as it always does where there is no room on the right.
    """
    named: dict[str, Artist] = {}
    for ax in panels:
        if legend := ax.get_legend():
            for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
                if handle is not None:
                    named.setdefault(text.get_text(), handle)
            legend.remove()
    if named:
        is_below = below or is_narrow()
        shared = figure.legend(
            handles=list(named.values()),
            labels=["" for _ in named],
            loc="outside lower left" if is_below else "outside right upper",
            ncols=abreast([*named], 68 * figure.get_figwidth()) if is_below else 1,
            fontsize=points("small"),
            **LEGEND,
        )
        write_labels(shared, named)


def keep_once(panels: Iterable[Axes]) -> None:
    """Takes away each legend and colour bar that says the same as one before it."""
    said: set[tuple[str, ...]] = set()
    for ax in panels:
        if legend := ax.get_legend():
            text = tuple(entry.get_text() for entry in legend.get_texts())
            if text in said:
                legend.remove()
            said.add(text)
        for mappable in ax.collections:
            if bar := mappable.colorbar:
                text = (bar.ax.get_ylabel(), bar.ax.get_xlabel())  # of a scale below
                if text in said:
                    bar.remove()
                said.add(text)
