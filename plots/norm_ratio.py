"""How much longer one gradient is than another, and what clipping left of each step."""

import pandas as pd
from matplotlib.figure import Figure

from .axes import dress, step_axis
from .figures import new_figure
from .fit import require, told_apart
from .inks import PLAIN, QUIET
from .lines import trajectory
from .style import points, strokes
from .ticks import log_scale
from .words import note
from .words import title as put_title


def norm_ratio(table: pd.DataFrame, *, title: str | None = None) -> Figure:
    """A figure of the ratio over the steps on a logarithmic scale, over the scale of clipping.

    - `table`: `step`, one column of blocks, `value` and `clip_scale`, as
      `geffect.analysis.norm_ratio` gives them.
    - `title`: above the panels.

    Returns the figure. Where it is not known what clipping did, there is no panel of it.

    >>> table = pd.DataFrame({"step": [0, 1], "model": "model", "value": [10.0, 0.1],
    ...                       "clip_scale": [1.0, 0.5], "score": "ratio", "unit": ""})
    >>> above, below = norm_ratio(table).axes
    >>> above.get_yscale(), *map(float, below.get_ylim())
    ('log', 0.0, 1.05)
    """
    require(table, ["step", "value", "clip_scale"])
    told_apart(table, most=0)
    scales = table.groupby("step")["clip_scale"].first().dropna()
    told = len(scales) > 0
    figure = new_figure(5.6, 3.4 + 1.0 * told)
    above, *below = figure.subplots(
        1 + told, 1, sharex=True, squeeze=False, height_ratios=(3, 1) if told else (1,)
    )[:, 0]
    trajectory(table, ax=above)
    if (table["value"] > 0).any():  # of gradients that are all zero there is no ratio
        log_scale(above)
    above.axhline(1.0, color=QUIET, linewidth=0.6, zorder=1)
    for ax in below:
        above.set_xlabel("")
        ax.plot(scales.index.to_numpy(), scales.to_numpy(dtype=float), color=PLAIN.colour,
                drawstyle="steps-mid", **strokes(linewidth=1.0))  # fmt: skip
        ax.set_ylim(0.0, 1.05)
        ax.set_ylabel("left by\nclipping", fontsize=points("medium"))
        step_axis(ax)
        dress(ax)
    if not told:
        note(above, "what clipping did is not known")
    if title is not None:
        put_title(figure, title)
    return figure
