"""A metric of others over what a run predicted."""

import pandas as pd
from matplotlib.axes import Axes

from .fit import all_levels, levels, once_only, require
from .style import drawn, dress, heading, inks, key, new_axes


def evaluations(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A metric over the accumulated predicted change, a line a risk, a point a checkpoint.

    - `table`: `step`, `metric`, `risk`, `change` and `value` of one metric.
    - `ax`: the axes to draw on; new ones if left out.

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
    colours = inks(all_levels(table["risk"]))
    ax = ax or new_axes()
    handles = []
    for risk, part in table.groupby("risk", observed=True, sort=False):
        ordered, ink = part.sort_values("step"), colours[str(risk)]
        handles += ax.plot(
            ordered["change"].to_numpy(dtype=float), ordered["value"].to_numpy(dtype=float),
            color=ink.colour, linestyle=ink.dashes, linewidth=1.2, marker="o", markersize=3,
            label=drawn(risk), zorder=3,
        )  # fmt: skip
    ax.set_xlabel("accumulated predicted fall of the risk (nats per token)", fontsize="medium")
    ax.set_ylabel(drawn(metrics[0]), fontsize="medium")
    dress(ax)
    heading(ax, drawn(metrics[0]))
    key(ax, handles)
    return ax
