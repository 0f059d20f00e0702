"""Curves of models, over whole numbers: what pictures of an audit have in common."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from geffect.scores import score_of

from .axes import dress
from .conventions import Asked
from .figures import new_axes
from .fit import constants, levels, once_only, require
from .legends import key
from .words import axis_label, heading


def curves_of_models(
    table: pd.DataFrame, over: str, says: str, ax: Axes | None, asked: Asked
) -> Axes:
    """A line a model over the column `over`, which `says` names."""
    require(table, ["model", over, "value"])
    once_only(table, ["model", over])
    known = levels(table["model"])
    colours = asked.inks(known)
    ax = ax or new_axes(5.2, 3.2)
    handles = []
    for model in asked.order(known):
        own, ink = table[table["model"].astype(str) == model].sort_values(over), colours[model]
        handles += ax.plot(
            own[over].to_numpy(), own["value"].to_numpy(dtype=float), label=model,
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.4, zorder=3,
                         marker="o" if len(own) <= 40 else "", markersize=3),
        )  # fmt: skip
    axis_label(ax.xaxis, says)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axis_label(ax.yaxis, score_of(table).full)
    dress(ax)
    heading(ax, constants(table.drop(columns="model")))
    key(ax, handles)
    return ax
