"""A metric of others over what a run predicted."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import all_levels, levels, once_only, require
from .legends import key
from .words import axis_label, drawn


@picture(Line2D)
def evaluations(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A metric over the accumulated predicted change, a line a risk, a point a checkpoint.

    - `table`: `step`, `metric`, `risk`, `change` and `value` of one metric.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of several metrics.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": [0, 5], "metric": "ES", "risk": "forget",
    ...                       "change": [0.0, -2.0], "value": [1.0, 0.3]})
    >>> evaluations(table, ax=Figure().subplots()).lines[0].get_xdata().tolist()
    [0.0, -2.0]
    """
    require(table, ["step", "metric", "risk", "change", "value"])
    metrics = levels(table["metric"])
    if len(metrics) > 1:
        raise ValueError(
            "`table` should be of one metric, since each has a scale of its own. Found "
            f"{', '.join(map(drawn, metrics))}. Draw them one by one."
        )
    once_only(table, ["risk", "step"])
    known = all_levels(table["risk"])
    colours = asked.inks(known)
    ax = ax or new_axes()
    handles = []
    for risk in asked.order(levels(table["risk"]), known):
        ordered, ink = table[table["risk"] == risk].sort_values("step"), colours[risk]
        handles += ax.plot(
            ordered["change"].to_numpy(dtype=float), ordered["value"].to_numpy(dtype=float),
            label=drawn(risk),
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.2, marker="o",
                         markersize=3, zorder=3),
        )  # fmt: skip
    axis_label(ax.xaxis, "accumulated predicted fall of the risk (nats per token)", longest=60)
    axis_label(ax.yaxis, metrics[0].replace("_", " "))
    dress(ax)
    key(ax, handles)
    return ax
