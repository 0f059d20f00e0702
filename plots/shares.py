"""Values of models with their intervals, a row each: what an audit found, beside its limits."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.scores import score_of

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import levels, once_only, require
from .inks import QUIET
from .legends import key
from .style import points, strokes
from .words import axis_label, drawn, longest

FILLED = "unlearned"
"""The model whose marks are filled: it is what an audit is of."""

ROW = 0.2  # inches
APART = 0.18  # of a row, between the marks of two models


@picture(Line2D)
def shares(
    table: pd.DataFrame,
    ax: Axes | None,
    asked: Asked,
    *,
    lines: Mapping[str, float] | None = None,
) -> Axes:
    """A row a label, in it a mark a model with its interval, and a line at each limit.

    - `table`: `label`, `model`, `value`, and its 95 % interval `low` and `high`; NaN bounds draw
      none, and a value that is not known has no mark. The axis is named by `score` and `unit`,
      where it has them.
    - `lines`: values by what they say, such as the limits of a verdict.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Each mark has a name as `gid`, which an SVG keeps: model, label and value.

    >>> table = pd.DataFrame({"label": ["int4", "int8"], "model": "unlearned", "value": [0.5, 0.2],
    ...                       "low": [0.4, 0.1], "high": [0.6, 0.3]})
    >>> ax = shares(table, lines={"hidden": 0.3})
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['int4', 'int8']
    """
    require(table, ["label", "model", "value", "low", "high"])
    once_only(table, ["label", "model"])
    there = table[np.isfinite(table["value"].to_numpy(dtype=float))]
    require(there, ["label"])
    labels, known = levels(there["label"]), levels(there["model"])
    colours = asked.inks(known)
    limits = dict(lines or {})
    ax = ax or new_axes(4.6 + 0.06 * longest(labels), 1.1 + ROW * (len(labels) + 2 * bool(limits)))
    models = asked.order(known)
    for said, value in limits.items():
        ax.axvline(value, color=QUIET, linewidth=0.7, linestyle=(0, (3, 2)), zorder=1)
        ax.text(
            value, 1.0, f" {drawn(said)}", transform=ax.get_xaxis_transform(), color="#555555",
            rotation=40, ha="left", va="bottom", rotation_mode="anchor", fontsize=points("x-small"),
        )  # fmt: skip
    ax.axvline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    handles: dict[str, Line2D] = {}
    for place, model in enumerate(models):
        own = there[there["model"].astype(str) == model]
        for row in own.to_dict("records"):
            y = labels.index(str(row["label"])) + APART * (place - (len(models) - 1) / 2)
            colour = colours[model].colour
            (mark,) = ax.plot(
                [row["value"]], [y], label=model,
                **asked.look(color=colour, linestyle="none", marker="o", markersize=4.2, zorder=4,
                             markerfacecolor=colour if model == FILLED else "white",
                             gid=f"{model}, {row['label']}: {row['value']:.3g}"),
            )  # fmt: skip
            handles.setdefault(model, mark)
            if np.isfinite([row["low"], row["high"]]).all():
                ax.plot(
                    [row["low"], row["high"]], [y, y], color=mark.get_color(), zorder=3,
                    solid_capstyle="butt", **strokes(linewidth=1.2),
                )  # fmt: skip
    ax.set_yticks(range(len(labels)), [drawn(label, 60) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    axis_label(ax.xaxis, score_of(table).full)
    ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)
    dress(ax)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    key(ax, list(handles.values()))
    return ax
