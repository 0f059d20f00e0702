"""The timeline of a conflict: where it is at each step, and how many blocks have it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from geffect.scores import score_of

from .figures import new_figure
from .fit import blocks_in, constants, told_apart
from .heatmap import heatmap
from .lines import trajectory
from .words import axis_label, longest
from .words import title as put_title


def timeline(table: pd.DataFrame, *, title: str | None = None) -> Figure:
    """A figure of blocks by steps, marked where a score of 0 or 1 is 1, over the rate of each step.

    - `table`: `step`, one column of blocks and `value` of 0 or 1, as `geffect.analysis.conflict`
      or `violation` gives them.
    - `title`: above the panels, in the place of what the table is of.

    Returns the figure. Raises ValueError for other scores.

    >>> from geffect.scores import YES_OR_NO, Score, tidy
    >>> table = tidy(np.array([[1.0, 0.0], [1.0, 1.0]]), Score("conflict", YES_OR_NO),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> above, below, _ = timeline(table).axes
    >>> below.lines[-1].get_ydata().tolist()
    [50.0, 100.0]
    """
    told_apart(table, most=0)
    score = score_of(table)
    if not score.is_rate:
        raise ValueError(
            f"`table` should be of a score that is 0 or 1. Found {score.full!r}. Pass that of "
            "conflict or violation, or draw it with heatmap."
        )
    blocks = blocks_in(table)
    tall = float(np.clip(0.17 * len(blocks), 2.2, 4.5))
    figure = new_figure(5.2 + 0.06 * longest(blocks), tall + 1.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(tall, 1.1))
    heatmap(table, ax=above)
    trajectory(table, ax=below)
    above.set_xlabel("")
    above.tick_params(axis="x", bottom=False)  # those of the rates are right below
    below.set_title("", loc="left")
    below.set_title("", loc="right")
    if (legend := below.get_legend()) is not None:
        legend.remove()
    axis_label(below.yaxis, "rate (%)")
    if title is not None or constants(table):
        above.set_title("", loc="left")
        put_title(figure, constants(table) if title is None else title)
    return figure
