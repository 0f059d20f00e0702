"""What forgetting costs, of many methods at once: each named where it reaches the level."""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .axes import dress
from .figures import new_figure, rows_and_columns
from .fit import levels, once_only, require
from .inks import QUIET, Ink, inks
from .style import is_narrow, points, strokes
from .ticks import log_scale
from .tradeoff import mark_level
from .words import axis_label, drawn, heading, level_headings
from .words import title as put_title

Floats = NDArray[np.float64]

APART = 0.045
"""Of the height of a panel: how far names stand from each other at least."""

ABREAST = 46
"""Characters of a line below a panel."""


def crossings(
    table: pd.DataFrame,
    by: str,
    kept: str,
    *,
    level: float,
    label: str,
    columns: int = 3,
    title: str | None = None,
) -> Figure:
    """A figure with a panel for each name in the column `by`, a line a method; lower is better.

    A line ends where it reaches the level, with its name on the right. Methods that do not reach it
    are thin and grey, and are named below the panel.

    - `table`: the losses of each run over its steps, with a true `at_level` where it reaches the
      level, interpolated between its steps; columns method, step, forget_nll, at_level, those of
      `by` and `kept`.
    - `kept`: the column of what should stay, in nats per token.
    - `level`: the forget loss of a model that was retrained without the forget data.
    - `label`: what `kept` is, for the axis.
    - `columns`: panels side by side, at most.
    - `title`: above the panels; none if left out.

    Returns the figure.

    >>> table = pd.DataFrame({"variant": "plain", "method": ["ga", "ga", "sku"], "step": [0, 5, 0],
    ...                       "forget_nll": [0.1, 2.0, 0.1], "retain_nll": [0.1, 1.5, 0.2],
    ...                       "at_level": [False, True, False]})
    >>> figure = crossings(table, "variant", "retain_nll", level=2.0, label="retain NLL")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['ga', 'not reached: sku']
    """
    require(table, [by, "method", "step", "forget_nll", kept, "at_level"])
    once_only(table, [by, "method", "step"])
    _check_level(table, level)
    names, looks = levels(table[by]), inks(levels(table["method"]))
    tall, wide = rows_and_columns(len(names), columns)
    figure = new_figure(4.3 * wide, (3.0 if is_narrow() else 4.9) * tall)
    shown = table[table["at_level"] | (table["forget_nll"] <= level)]
    values = shown[kept].to_numpy(dtype=float)
    limits = (0.8 * values[values > 0].min(), 1.25 * values.max())
    for index, name in enumerate(names):
        ax = figure.add_subplot(tall, wide, index + 1)
        log_scale(ax)
        ax.set_xlim(0.0, level)
        ax.set_ylim(*limits)
        _panel(ax, shown[shown[by].astype(str) == name], kept, level, looks)
        axis_label(ax.xaxis, "forget NLL (nats per token)")
        if index % wide == 0:
            axis_label(ax.yaxis, f"{label} (nats per token)", longest=60)
        dress(ax)
        mark_level(ax, level, named=index == 0)  # the level of all
        heading(ax, name)
    level_headings(figure.axes[row * wide :][:wide] for row in range(tall))
    if title:
        put_title(figure, title)
    return figure


def _check_level(table: pd.DataFrame, level: float) -> None:
    """Refuse a point at the level that is elsewhere: its line would end beside it."""
    there = table.loc[table["at_level"].astype(bool), "forget_nll"].to_numpy(dtype=float)
    away = there[~np.isclose(there, level)]
    if len(away):
        raise ValueError(
            f"`forget_nll` of a row with a true `at_level` should be `level`, {level:g}. Found "
            f"{away[0]:g}. Interpolate between the steps around the level."
        )


def _panel(ax: Axes, part: pd.DataFrame, kept: str, level: float, looks: Mapping[str, Ink]) -> None:
    ends: dict[str, float] = {}
    lines: dict[str, tuple[Floats, Floats]] = {}
    for method in levels(part["method"]):
        own = part[part["method"].astype(str) == method].sort_values("step")
        lines[method] = own["forget_nll"].to_numpy(dtype=float), own[kept].to_numpy(dtype=float)
        reached = own.loc[own["at_level"].astype(bool), kept]
        if len(reached):
            ends[method] = float(reached.iloc[0])
    for method in lines.keys() - ends.keys():
        ax.plot(*lines[method], color=QUIET, linewidth=0.6, alpha=0.7, zorder=2)
    ordered = sorted(ends, key=lambda method: ends[method])
    places = within(spread([_share(ax, ends[method]) for method in ordered], APART), APART)
    for method, place in zip(ordered, places, strict=True):
        ink = looks[method]
        look = strokes(color=ink.colour, linewidth=1.1, markersize=4)
        ax.plot(*lines[method], linestyle=ink.dashes, zorder=3, **look)
        ax.plot([level], [ends[method]], marker="o", clip_on=False, zorder=4, **look)
        ax.annotate(
            drawn(method), xy=(1.0, _share(ax, ends[method])), xytext=(1.08, place),
            xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=points("x-small"), color=ink.colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink.colour, "linewidth": 0.5,
                        "relpos": (0.0, 0.5), "shrinkA": 0.0, "shrinkB": 2.0},
        )  # fmt: skip
    missed = [method for method in lines if method not in ends]
    if missed:
        ax.annotate(
            _on_lines(f"not reached: {', '.join(map(drawn, missed))}"), xy=(0.0, 0.0),
            xycoords=("axes fraction", ax.xaxis.label), xytext=(0, -3),
            textcoords="offset points", va="top", fontsize=points("x-small"), color="#555555",
            annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Ascending places, moved so that neighbours are apart, the mean of each crowd kept.

    >>> [round(place, 3) for place in spread([0.1, 0.5, 0.5], 0.1)]
    [0.1, 0.45, 0.55]
    """
    crowds: list[tuple[float, int]] = []  # middle and count
    for place in places:
        crowds.append((place, 1))
        while len(crowds) > 1:
            (low, below), (high, above) = crowds[-2:]
            if high - low >= apart * (below + above) / 2:
                break
            count = below + above
            crowds[-2:] = [((low * below + high * above) / count, count)]
    return [
        middle + apart * (i - (count - 1) / 2) for middle, count in crowds for i in range(count)
    ]


def within(places: Sequence[float], apart: float) -> list[float]:
    """The same places from 0 to 1, as far as there is room.

    >>> within([-0.1, 0.95, 1.2], 0.1)
    [0.0, 0.9, 1.0]
    """
    count = len(places)
    low = [max(place, apart * i) for i, place in enumerate(places)]
    return [min(place, 1.0 - apart * (count - 1 - i)) for i, place in enumerate(low)]


def _share(ax: Axes, value: float) -> float:
    """Where a value is on the logarithmic axis, from 0 to 1."""
    low, high = np.log(ax.get_ylim())
    return float((np.log(value) - low) / (high - low))


def _on_lines(text: str) -> str:
    return "\n".join(wrap(text, ABREAST, break_on_hyphens=False))
