"""The walk of a run between forgetting and damage: both accumulated risks against each other."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.scores import score_of
from geffect.sources import FORGET, RETAIN

from .accumulated import PREDICTED
from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import (
    all_levels,
    constants,
    levels,
    names_in,
    once_only,
    one_block,
    require,
    require_names,
)
from .inks import DASHED, QUIET, SOLID
from .legends import key
from .long import rolling_median, window_of_all
from .style import strokes
from .words import axis_label, heading, note


@picture(Line2D)
def walk(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """The rise of the retain risk over that of the forget risk, step by step, from the origin.

    - `table`: `step`, `risk` ("forget" and "retain"), `how` ("predicted" and "measured") and
      `value`, as `geffect.analysis.accumulated` gives them; maybe a column that tells runs apart.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table without one of the risks.

    Of runs whose walks end at equal forgetting, the lower one costs less. A dot ends each line. One
    run has a line for what its updates predict and one for what was measured; of several each has
    a colour, and what was measured is dashed. Of long runs what was measured is its rolling median,
    before all values: each of these is of another batch.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": [0, 1] * 2, "risk": ["forget"] * 2 + ["retain"] * 2,
    ...                       "how": "predicted", "value": [0.0, 0.4, 0.0, 0.1]})
    >>> walk(table, ax=Figure().subplots()).lines[2].get_xdata().tolist()
    [0.0, 0.4]
    """
    require(table, ["step", "risk", "how", "value"])
    one_block(table)
    several = [
        column
        for column, names in names_in(table).items()
        if column not in ("risk", "how") and len(names) > 1
    ]
    if len(several) > 1:
        raise ValueError(
            "`table` should have one column that tells runs apart. Found "
            f"{', '.join(several)}. Choose with table[table[{several[0]!r}] == ...]."
        )
    hue = several[0] if several else "how"
    once_only(table, [*several, "step", "risk", "how"])
    require_names(table, "risk", (FORGET, RETAIN), "Record a run with both.")
    known = all_levels(table[hue])
    colours = asked.inks(known)
    ax = ax or new_axes(5.2, 3.6)
    for at_zero in (ax.axhline, ax.axvline):
        at_zero(0.0, color=QUIET, linewidth=0.6, zorder=1)
    ways = [
        (name, how, _way(of_name[of_name["how"] == how]))
        for name in asked.order(levels(table[hue]), known)
        for of_name in [table[table[hue].astype(str) == name]]
        for how in levels(of_name["how"])
    ]
    over = window_of_all(len(way) for _, how, way in ways if how != PREDICTED)
    handles: list[Line2D] = []
    for name, how, way in ways:
        dashes, rolled = (SOLID, way) if how == PREDICTED else (DASHED, rolling_median(way, over))
        if rolled is not way:
            ax.plot(
                way[FORGET], way[RETAIN], color=colours[name].colour, alpha=0.18, zorder=2,
                **strokes(linewidth=0.4),
            )  # fmt: skip
        x, y = (rolled[risk].to_numpy(dtype=float) for risk in (FORGET, RETAIN))
        (line,) = ax.plot(
            x, y, label=name,
            **asked.look(color=colours[name].colour, linestyle=dashes, linewidth=1.4, zorder=3),
        )  # fmt: skip
        ax.plot(
            x[-1:], y[-1:], color=line.get_color(), linestyle="none", marker="o", zorder=4,
            **strokes(markersize=4),
        )  # fmt: skip
        handles += [line] if name not in {h.get_label() for h in handles} else []
    rise = score_of(table).full
    axis_label(ax.xaxis, f"forget: {rise}")
    axis_label(ax.yaxis, f"retain: {rise}")
    dress(ax)
    heading(ax, constants(table.drop(columns=["risk", "how"])))
    said = ["right: forgets", "up: harms", *(["dashed: measured"] if several else [])]
    if over > 1:
        said.append(f"measured: median of {over} points")
    note(ax, "; ".join(said))
    key(ax, handles)
    return ax


def _way(own: pd.DataFrame) -> pd.DataFrame:
    """Both risks, a column each, at the steps at which both are known."""
    return own.pivot(index="step", columns="risk", values="value").sort_index().dropna()
