"""How far each risk has risen along a run: as its updates predict it, and as it was measured."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.numbers import percent
from geffect.scores import score_of
from geffect.text import plain

from .axes import dress, step_axis
from .conventions import Asked, picture
from .figures import new_axes
from .fit import all_levels, constants, levels, once_only, one_block, require
from .inks import DASHED, QUIET, SOLID
from .legends import key
from .long import rolling_median, window_of_all
from .style import points, strokes
from .words import axis_label, heading, note

PREDICTED, MEASURED = "predicted", "measured"


@picture(Line2D)
def accumulated(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A line a risk as the updates predict its rise, and a point a step as it was measured.

    - `table`: `step`, `risk`, `how` ("predicted" and "measured"), `value` and `gap`, as
      `geffect.analysis.accumulated` gives them.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of several runs.

    Where points leave their line, first-order scores say little. The relative gap at the last step
    stands in the corner; where it is more than all that was measured, both numbers do. Of a long
    run the rolling median of the points is drawn too: each of these is of another batch.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": [0, 1] * 2, "model": "model", "risk": "forget",
    ...                       "how": ["predicted"] * 2 + ["measured"] * 2,
    ...                       "value": [0.0, 0.4, 0.0, 0.5], "gap": [float("nan"), 0.2] * 2})
    >>> ax = accumulated(table, ax=Figure().subplots())
    >>> ax.get_title(loc="right"), ax.texts[0].get_text().splitlines()
    ('lines: predicted; points: measured', ['gap at the end', 'forget 20 %'])
    """
    require(table, ["step", "risk", "how", "value", "gap"])
    one_block(table)
    once_only(table, ["step", "risk", "how"])
    known = all_levels(table["risk"])
    colours = asked.inks(known)
    ax = ax or new_axes()
    ax.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    points_of = table.loc[(table["how"] == MEASURED) & table["value"].notna(), "risk"]
    drawn = asked.order(levels(table["risk"]), known)
    over = window_of_all(int((points_of == risk).sum()) for risk in drawn)
    handles, gaps = [], []
    for risk in drawn:
        own = table[table["risk"] == risk].sort_values("step")
        predicted, measured = (own[own["how"] == how] for how in (PREDICTED, MEASURED))
        handles += ax.plot(
            predicted["step"].to_numpy(), predicted["value"].to_numpy(dtype=float), label=risk,
            **asked.look(color=colours[risk].colour, linestyle=SOLID, linewidth=1.4, zorder=3),
        )  # fmt: skip
        _measured(ax, measured, over, handles[-1].get_color())
        gaps += _gap(plain(risk), predicted, measured)
    step_axis(ax)
    axis_label(ax.yaxis, score_of(table).full)
    dress(ax)
    heading(ax, constants(table.drop(columns=["risk", "how"])))
    rolled = f"; dashed: median of {over} points" if over > 1 else ""
    note(ax, f"lines: predicted; points: measured{rolled}")
    if gaps:
        ax.text(
            0.03, 0.97, "\n".join(["gap at the end", *gaps]), transform=ax.transAxes, va="top",
            fontsize=points("x-small"), color="#555555", parse_math=False,
        )  # fmt: skip
    key(ax, handles)
    return ax


def _measured(ax: Axes, measured: pd.DataFrame, over: int, colour: Any) -> None:
    """A point a step; of a long run faint ones, with their rolling median before them."""
    measured = measured[measured["value"].notna()]
    steps, values = measured["step"].to_numpy(), measured["value"].astype(float)
    crowd: dict[str, Any] = {"markerfacecolor": "white", **strokes(markersize=2.6)}
    if over > 1:
        crowd = {"alpha": 0.2, **strokes(markersize=1.2)}
        ax.plot(
            steps, rolling_median(values, over), color=colour, linestyle=DASHED, zorder=5,
            **strokes(linewidth=1.2),
        )  # fmt: skip
    ax.plot(
        steps, values, color=colour, linestyle="none", marker="o", zorder=4,
        **crowd, **strokes(markeredgewidth=0.8),
    )  # fmt: skip


def _gap(risk: str, predicted: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    """The last gap that is known: as a share, or as both numbers where that is more than all.

    What has hardly moved has a share of thousands of per cent, which would tell of nothing.
    """
    known = measured[measured["gap"].notna()]
    if known.empty:
        return []
    last = known.iloc[-1]
    if last["gap"] <= 1:
        return [f"{risk} {percent(last['gap'])}"]
    expected = predicted.set_index("step")["value"].at[last["step"]]
    return [f"{risk} {expected:.2g} predicted, {last['value']:.2g} measured"]
