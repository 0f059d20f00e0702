"""Pairs of requests, in colour."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from geffect.scores import score_of

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import levels
from .frames import colours_of
from .legends import colour_bar
from .style import points
from .text import readable_on
from .ticks import slant
from .words import axis_label, drawn, longest


@picture(QuadMesh, by="cmap")
def pairs(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A cell for each two requests, with its number: the later one in a row, the earlier below.

    - `table`: `request`, `other` and `value`, one row for each two requests.
    - `ax`, `cmap`, `xlim`, `ylim`, `title`, keywords of a mesh: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table with several rows of two requests.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"request": ["b"], "other": ["a"], "model": ["model"], "value": [0.5],
    ...                       "score": ["overlap"], "unit": [""]})
    >>> ax = pairs(table, ax=Figure().subplots())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['b']
    """
    keys = ["request", "other"]
    if table.duplicated(keys).any():
        raise ValueError(
            "`table` should have one row for each two requests. Found several, of other blocks or "
            "quantities. Choose, say, table[table['quantity'] == 'cosine'] of by=\"model\"."
        )
    # In the order of the requests, which a table that was read from a file does not say elsewhere.
    later, earlier = levels(table["request"]), levels(table["other"])
    named = table.astype({"request": str, "other": str})
    grid = named.pivot(index="request", columns="other", values="value")
    cells = np.ma.masked_invalid(grid.reindex(index=later, columns=earlier).to_numpy(dtype=float))
    if ax is None:
        # The label of the scale is on its side, and the names below are slanted.
        tall = max(2.4, 0.4 * len(later)) + 0.05 * longest(earlier)
        left = 0.08 * max(longest(later), longest(earlier))
        ax = new_axes(max(1.6, 0.6 * len(earlier)) + left + 1.4, tall)
    cmap, norm = colours_of(table)
    mesh = ax.pcolormesh(cells, **asked.mesh(cmap, norm))
    mesh.set_cmap(mesh.cmap.with_extremes(bad="none"))
    ax.invert_yaxis()
    called = [*map(drawn, earlier)]
    turned = slant(ax, called, points("small"), angle=30)
    ax.set_xticks(np.arange(len(earlier)) + 0.5, called, **turned)
    ax.set_yticks(np.arange(len(later)) + 0.5, [*map(drawn, later)])
    axis_label(ax.xaxis, "earlier request")
    axis_label(ax.yaxis, "request")
    columns, rows = ({name: place for place, name in enumerate(of)} for of in (earlier, later))
    for pair in table.to_dict("records"):
        value = pair["value"]
        is_known = bool(np.isfinite(value))
        background = tuple(mesh.to_rgba(value)) if is_known else (1.0, 1.0, 1.0, 1.0)
        ax.text(
            columns[str(pair["other"])] + 0.5,
            rows[str(pair["request"])] + 0.5,
            f"{value:.2f}" if is_known else "undefined",
            ha="center",
            va="center",
            color=readable_on(background),
            fontsize=points("medium" if is_known else "small"),
        )
    dress(ax, frame=False)
    colour_bar(ax, mesh, score_of(table).full)
    return ax
