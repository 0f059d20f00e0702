"""The half-spaces of the G-effect: where a gradient forgets and where it keeps, in one plane."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Wedge

from geffect.sources import FORGET, OBJECTIVE, RETAIN

from .conventions import Asked, picture
from .figures import new_axes
from .fit import blocks_in, constants, require, require_names
from .inks import QUIET
from .legends import key
from .style import points
from .words import heading, note

GRADIENTS = (FORGET, RETAIN, OBJECTIVE)
"""Those that are drawn."""

WANTED = "#3d3d3d"  # no hue: those of all gradients and runs have a meaning
REACH = 1.5
NARROW = 35.0  # degrees, which have no room for words


@picture(Line2D)
def half_spaces(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """The gradients of a step in the plane of forget and retain; in the grey, it forgets and keeps.

    - `table`: `source`, `other` and their cosine `value`, of one step and block, as
      `geffect.analysis.angles` gives them.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of several steps or blocks, or without the
    gradients of objective, forget and retain.

    A step is taken against the gradient of the objective. That has a negative unlearning G-effect
    on the side away from the forget gradient, and a retaining one of zero or more on the side of
    the retain gradient. Forget and retain gradient have the length 1, the objective's is the share
    of it that lies in their plane.

    >>> from itertools import product
    >>> cosines = {("objective", "forget"): -1.0, ("objective", "retain"): -0.5,
    ...            ("forget", "retain"): 0.5}
    >>> names = ["objective", "forget", "retain"]
    >>> table = pd.DataFrame([(0, "model", a, b, cosines.get((a, b), cosines.get((b, a), 1.0)))
    ...                       for a, b in product(names, names)],
    ...                      columns=["step", "model", "source", "other", "value"])
    >>> ax = half_spaces(table)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['forget', 'retain', 'objective']
    """
    places = _places(table)
    colours = {name: ink.colour for name, ink in asked.inks(GRADIENTS).items()}
    ax = ax or new_axes(4.4, 3.2)
    ax.set_aspect("equal")
    ax.set_xlim(-REACH, REACH)
    ax.set_ylim(-REACH, REACH)
    ax.set_axis_off()
    angle = float(np.degrees(np.arctan2(*places[RETAIN][::-1])))
    for low, high, colour, alpha in (
        (90.0, 270.0, colours[FORGET], 0.08),
        (angle - 90, angle + 90, colours[RETAIN], 0.12),
        (90.0, angle + 90, WANTED, 0.2),  # of one half what lies in the other
    ):
        ax.add_patch(Wedge((0, 0), REACH, low, high, facecolor=colour, alpha=alpha, linewidth=0))
    for said, low, high in (
        ("forgets,\nkeeps", 90.0, angle + 90),
        ("forgets,\nharms", angle + 90, 270.0),
        ("relearns,\nharms", 270.0, angle + 270),
        ("relearns,\nkeeps", angle - 90, 90.0),
    ):
        if high - low > NARROW:
            _say(ax, said, (low + high) / 2, WANTED if low == 90.0 else QUIET)
    lines = []
    for name in asked.order(GRADIENTS):
        (x, y), colour = places[name], colours[name]
        lines += ax.plot(
            [0.0, x], [0.0, y], label=name,
            **asked.look(color=colour, linewidth=1.8, solid_capstyle="butt", zorder=3),
        )  # fmt: skip
        towards = float(np.degrees(np.arctan2(y, x)))
        ax.plot(
            [x], [y], marker=(3, 0, towards - 90), markersize=4 * lines[-1].get_linewidth(),
            color=lines[-1].get_color(), alpha=lines[-1].get_alpha(), markeredgewidth=0, zorder=3,
        )  # fmt: skip
    key(ax, lines, title="gradient")
    heading(ax, constants(table.drop(columns=["source", "other"])))
    note(ax, f"step {table['step'].iloc[0]:g}")
    return ax


def _say(ax: Axes, said: str, towards: float, colour: str) -> None:
    """Words in a direction, inside of the circle."""
    x, y = 1.1 * np.cos(np.radians(towards)), 1.1 * np.sin(np.radians(towards))
    ax.text(
        x, y, said, color=colour, fontsize=points("small"), ha="center", va="center", zorder=4,
        linespacing=0.95,
    )  # fmt: skip


def _places(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The three gradients in the plane of the first two, the forget gradient along x."""
    require(table, ["step", "source", "other", "value"])
    steps, blocks = table["step"].unique(), blocks_in(table)
    if len(steps) > 1 or len(blocks) > 1:
        raise ValueError(
            "`table` should be of one step and block. Found "
            f"{len(steps)} steps and {len(blocks)} blocks. Choose with "
            f"table[table['step'] == {steps[0]}]."
        )
    pairs = table.assign(
        source=table["source"].astype(str), other=table["other"].astype(str)
    ).set_index(["source", "other"])["value"]
    require_names(table, "source", GRADIENTS, "Record a run with an objective and both risks.")
    between = float(pairs[FORGET, RETAIN])
    with_forget, with_retain = float(pairs[OBJECTIVE, FORGET]), float(pairs[OBJECTIVE, RETAIN])
    if not np.isfinite([between, with_forget, with_retain]).all():
        raise ValueError(
            "`table` should have a direction for each gradient. Found one of zero, or absent, at "
            f"step {steps[0]}. Choose another step."
        )
    height = np.sqrt(max(0.0, 1 - between**2))
    # Where both lie on one line, so does all that their plane shows.
    off = (with_retain - between * with_forget) / height if height > 1e-6 else 0.0
    return {
        FORGET: np.array([1.0, 0.0]),
        RETAIN: np.array([between, height]),
        OBJECTIVE: np.array([with_forget, off]),
    }
