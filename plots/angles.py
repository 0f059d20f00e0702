"""The Gram panel: the cosine of every two gradients, and how long each is."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import constants, levels, once_only, one_block, require
from .inks import DIVERGING
from .legends import colour_bar
from .style import points
from .text import readable_on
from .ticks import slant
from .words import drawn, heading, note


@picture(QuadMesh, by="cmap")
def angles(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A cell for every two gradients with their cosine, on the diagonal the length of each.

    - `table`: `step`, `source`, `other`, `value` and `length`, as `geffect.analysis.angles` gives
      them, of one block. Of several steps the median is shown.
    - `ax`, `cmap`, `xlim`, `ylim`, `title`, keywords of meshes: see `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of several blocks.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": 0, "model": "model", "source": ["a", "a", "b", "b"],
    ...                       "other": ["a", "b", "a", "b"], "value": [1.0, -0.5, -0.5, 1.0],
    ...                       "length": [2.0, 2.0, 30.0, 30.0]})
    >>> [text.get_text() for text in angles(table, ax=Figure().subplots()).texts]
    ['|g|\\n2', '-0.50', '-0.50', '|g|\\n30']
    """
    require(table, ["step", "source", "other", "value", "length"])
    one_block(table)
    once_only(table, ["step", "source", "other"])
    names = levels(table["source"])
    medians = table.astype({"source": str, "other": str}).groupby(["source", "other"])
    cosines = medians["value"].median().unstack().reindex(index=names, columns=names)
    lengths = medians["length"].median().groupby("source").first().reindex(names)
    values = cosines.to_numpy(dtype=float)
    cells = np.ma.masked_invalid(values)
    cells[np.diag_indices(len(names))] = 0.0  # white: there stands a length
    ax = ax or new_axes(1.6 + 0.62 * len(names), 1.2 + 0.5 * len(names))
    edges = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(
        edges, edges, cells,
        **asked.mesh(DIVERGING, Normalize(-1.0, 1.0), edgecolors="white", linewidth=1.0),
    )  # fmt: skip
    colours = mesh.to_rgba(cells)
    for row, source in enumerate(names):
        for column in range(len(names)):
            value = values[row, column]
            own = f"|g|\n{lengths[source]:.2g}" if np.isfinite(lengths[source]) else ""
            cosine = "" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # never -0.00
            said = own if row == column else cosine
            ax.text(
                column, row, said, ha="center", va="center", fontsize=points("x-small"),
                color=readable_on(colours[row, column]),
            )  # fmt: skip
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(-0.5, len(names) - 0.5)
    places = range(len(names))
    called = [*map(drawn, names)]
    ax.set_xticks(places, called, **slant(ax, called, points("small")))
    ax.set_yticks(places, called)
    dress(ax, frame=False)
    ax.tick_params(length=0)
    heading(ax, constants(table.drop(columns=["source", "other"])))
    steps = table["step"].nunique()
    note(ax, f"median of {steps} steps" if steps > 1 else f"step {table['step'].iloc[0]:g}")
    colour_bar(ax, mesh, "cosine", "(grey: undefined)" if np.isnan(values).any() else "")
    return ax
