"""What forgetting costs: retain loss against forget loss, along each run."""

from collections.abc import Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .conventions import Asked, picture
from .fit import all_levels, constants, levels, once_only, require
from .style import QUIET, Ink, axis_label, dress, heading, key, new_axes, note
from .ticks import log_ticks

MARKERS = ("o", "s", "^", "D", "v", "P")


@picture(Line2D)
def tradeoff(
    table: pd.DataFrame, ax: Axes | None, asked: Asked, *, level: float | None = None
) -> Axes:
    """A point a step, a line a variant, a marker a method; lower at equal forgetting is better.

    - `table`: the losses of each run over its steps; rows with a true `at_level` stand out.
    - `level`: the forget loss of a model that was retrained without the forget data, in nats per
      token. Runs beyond it have forgotten more than retraining would.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"method": "npo", "variant": ["plain", "plain", "gru", "gru"],
    ...                       "step": [0, 5, 0, 5], "forget_nll": [0.1, 2.0, 0.1, 1.8],
    ...                       "retain_nll": [0.1, 1.5, 0.1, 0.4]})
    >>> ax = tradeoff(table, level=1.9, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['plain', 'gru']
    """
    require(table, ["method", "variant", "step", "forget_nll", "retain_nll"])
    once_only(table, ["method", "variant", "step"])
    methods, variants = levels(table["method"]), levels(table["variant"])
    colours = asked.inks(all_levels(table["variant"]))
    variants = asked.order(variants, colours)
    markers = dict(zip(all_levels(table["method"]), cycle(MARKERS), strict=False))
    ax = ax or new_axes(5.8, 3.8)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    lines = table.groupby(["method", "variant"], observed=True, sort=False)
    for (method, variant), part in lines:
        if str(variant) not in variants:
            continue
        ink, marker, ordered = colours[str(variant)], markers[str(method)], part.sort_values("step")
        forget, retain = ordered["forget_nll"].to_numpy(), ordered["retain_nll"].to_numpy()
        ax.plot(
            forget, retain,
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.3, marker=marker,
                         markersize=2.8, zorder=3),
        )  # fmt: skip
        if "at_level" in ordered:
            reached = ordered["at_level"].to_numpy(dtype=bool)
            ax.plot(
                forget[reached], retain[reached], color=ink.colour, linestyle="none",
                marker=marker, markersize=7.5, markeredgecolor="white", zorder=4,
            )  # fmt: skip
    if level is not None:
        mark(ax, level)
    axis_label(ax.xaxis, "forget NLL (nats per token)")
    axis_label(ax.yaxis, "retain NLL (nats per token)")
    dress(ax)
    heading(ax, constants(table[["method", "variant"]]))
    key(ax, [*ink_samples(colours, variants), *marker_samples(markers, methods)])
    return ax


def mark(ax: Axes, level: float) -> None:
    """A line at the level, the region beyond shaded and named."""
    beyond = Rectangle(
        (level, 0.0), 1e4, 1.0, transform=ax.get_xaxis_transform(), color=QUIET, alpha=0.12,
        linewidth=0, zorder=0,
    )  # fmt: skip
    # As an artist and not as a patch it reaches past any data without stretching the axis to it.
    ax.add_artist(beyond)
    ax.axvline(level, color=QUIET, linewidth=0.8, zorder=1)
    note(ax, "retrained without the forget data")


def ink_samples(colours: dict[str, Ink], names: Sequence[str]) -> list[Line2D]:
    """A stretch of each line for the legend."""
    return [
        Line2D([], [], color=colours[name].colour, linestyle=colours[name].dashes, label=name)
        for name in names
    ]


def marker_samples(markers: dict[str, str], names: Sequence[str]) -> list[Line2D]:
    """Each marker for the legend, where there is more than one."""
    return [
        Line2D([], [], color=QUIET, linestyle="none", marker=markers[name], label=name)
        for name in names
        if len(names) > 1
    ]
