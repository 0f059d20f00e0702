"""The figures of the G-effect paper (arXiv 2502.19301), by its numbers: tables in, figures out.

Effects are score tables of `geffect.analysis.g_effect`, of one block, below one another in a column
`setting`, such as "beta 0.1" (`geffect.scores.stack`). `geffect figures --paper` makes them all.
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .contours import contours
from .conventions import Draws
from .figures import figure_of
from .fit import levels
from .half_spaces import half_spaces
from .inks import strength_colours
from .lines import trajectory
from .metrics import metrics
from .sheet import facets
from .ticks import log_scale

IN_TABLE_1 = ("forget quality", "model utility", "ES exact", "ES perturbed")
"""The metrics of the paper's table 1, in its order."""

KEEP_METRICS = 'What was measured is kept by recorder.keep_table("metrics", ...).'


def figure_1(table: pd.DataFrame) -> Figure:
    """A figure of the half-spaces of both effects, from the angles of one step."""
    return _alone(half_spaces, table)


def figure_3a(table: pd.DataFrame) -> Figure:
    """A figure of the effects of GA over the steps, from a table of one or more settings.

    >>> import numpy as np
    >>> from geffect.scores import Score, stack, tidy
    >>> one = tidy(np.array([[-3.0], [2.0]]), Score("G-effect", "nats"),
    ...            steps=np.array([0, 5]), blocks=["model"], by="model")
    >>> effects = stack({"unlearning": one, "retaining": one}, "effect")
    >>> figure = figure_3a(stack({"GA": effects}, "setting"))
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['GA']
    """
    return _by_setting(table, "GA")


def figure_3b(table: pd.DataFrame) -> Figure:
    """A figure of the effects of GA in each group of layers, from a table by group."""
    return facets(table, trajectory, "effect", columns=2)


def figure_3c(table: pd.DataFrame) -> Figure:
    """A figure of the effects of WGA, a panel for each alpha."""
    return _by_setting(table, "WGA")


def figure_4(table: pd.DataFrame) -> Figure:
    """A figure of the effects of NPO, a panel for each beta."""
    return _by_setting(table, "NPO")


def figure_5a(table: pd.DataFrame) -> Figure:
    """A figure of the mean weight that NPO gives its samples, a line for each beta.

    A darker line is of a later setting; `geffect figures` puts the largest beta last.
    """
    return _alone(
        trajectory, table, title="NPO", palette=strength_colours(levels(table["setting"]))
    )


def figure_5b(table: pd.DataFrame) -> Figure:
    """A figure of the effects of each sample under NPO, in colours by their weights."""
    return _alone(contours, table)


def figure_5c(table: pd.DataFrame) -> Figure:
    """A figure of the effects of TNPO, a panel for each beta."""
    return _by_setting(table, "TNPO")


def figure_6(table: pd.DataFrame) -> Figure:
    """A figure of the effects of PO over the steps."""
    return _by_setting(table, "PO")


def figure_7(table: pd.DataFrame) -> Figure:
    """A figure of the effects of RMU, a panel for each layer and coefficient."""
    return _by_setting(table, "RMU")


def regularisers(table: pd.DataFrame) -> Figure:
    """A figure of the effects with each regulariser (GD, KL, RR), a panel for each."""
    return _by_setting(table, "regularisers")


def inverse_confidence(table: pd.DataFrame) -> Figure:
    """A figure of the mean of 1/p over the steps, a line for each setting."""
    figure = _alone(trajectory, table, title="")
    (ax,) = figure.axes
    log_scale(ax)
    ax.set_ylim(bottom=0.8)  # no 1/p is below 1
    return figure


def table_1(table: pd.DataFrame) -> Figure:
    """A figure of metrics as a table: a row for each setting, a column for each metric.

    Those of the paper come first, also where no run has them: what to keep is said below.
    """
    found = levels(table["metric"])
    missing = [name for name in IN_TABLE_1 if name not in found]
    # A row without a value is a column of dashes.
    lacking = table.iloc[[0] * len(missing)].assign(metric=missing, value=float("nan"))
    order = [*IN_TABLE_1, *(name for name in found if name not in IN_TABLE_1)]
    whole = pd.concat([table, lacking], ignore_index=True).astype(
        {"metric": pd.CategoricalDtype(order, ordered=True)}
    )
    below = f"Not in the runs: {', '.join(missing)}. {KEEP_METRICS}" if missing else ""
    return metrics(whole, below=below)


def _by_setting(table: pd.DataFrame, title: str) -> Figure:
    alone = levels(table["setting"]) == [title]
    return facets(table, trajectory, "setting", title="" if alone else title)


def _alone(plot: Draws, table: pd.DataFrame, **how: Any) -> Figure:
    return figure_of(plot(table, **how))
