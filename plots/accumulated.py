"""How far each risk has risen along a run: as its updates predict it, and as it was measured."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.numbers import percent
from geffect.scores import score_of
from geffect.text import plain

from .axes import dress, step_axis
from .conventions import Asked, picture
from .figures import new_axes
from .fit import all_levels, constants, levels, once_only, require
from .inks import QUIET, SOLID
from .legends import key
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
    stands in the corner; where it is more than all that was measured, both numbers do.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"step": [0, 1] * 2, "model": "model", "risk": "forget",
    ...                       "how": ["predicted"] * 2 + ["measured"] * 2,
    ...                       "value": [0.0, 0.4, 0.0, 0.5], "gap": [float("nan"), 0.2] * 2})
    >>> ax = accumulated(table, ax=Figure().subplots())
    >>> ax.get_title(loc="right"), ax.texts[0].get_text().splitlines()
    ('lines: predicted; points: measured', ['gap at the end', 'forget 20 %'])
    """
    require(table, ["step", "risk", "how", "value", "gap"])
    once_only(table, ["step", "risk", "how"])
    known = all_levels(table["risk"])
    colours = asked.inks(known)
    ax = ax or new_axes()
    ax.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    handles, gaps = [], []
    for risk in asked.order(levels(table["risk"]), known):
        own = table[table["risk"] == risk].sort_values("step")
        predicted, measured = (own[own["how"] == how] for how in (PREDICTED, MEASURED))
        handles += ax.plot(
            predicted["step"].to_numpy(), predicted["value"].to_numpy(dtype=float), label=risk,
            **asked.look(color=colours[risk].colour, linestyle=SOLID, linewidth=1.4, zorder=3),
        )  # fmt: skip
        ax.plot(
            measured["step"].to_numpy(), measured["value"].to_numpy(dtype=float),
            color=handles[-1].get_color(), linestyle="none", marker="o",
            markerfacecolor="white", zorder=4, **strokes(markersize=2.6, markeredgewidth=0.8),
        )  # fmt: skip
        gaps += _gap(plain(risk), predicted, measured)
    step_axis(ax)
    axis_label(ax.yaxis, score_of(table).full)
    dress(ax)
    heading(ax, constants(table.drop(columns=["risk", "how"])))
    note(ax, "lines: predicted; points: measured")
    if gaps:
        ax.text(
            0.03, 0.97, "\n".join(["gap at the end", *gaps]), transform=ax.transAxes, va="top",
            fontsize=points("x-small"), color="#555555", parse_math=False,
        )  # fmt: skip
    key(ax, handles)
    return ax


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
    return [f"{risk} {expected:.2g} for {last['value']:.2g}"]
