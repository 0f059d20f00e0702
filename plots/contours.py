"""Where samples lie between forgetting and damage, by the weight that the objective gives them."""

from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.contour import ContourSet
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from geffect.scores import score_of
from geffect.sources import FORGET, RETAIN

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import constants, once_only, require, require_names, seed_in
from .frames import LINEAR_SHARE, Frame
from .inks import QUIET
from .legends import key
from .style import points, strokes
from .ticks import Decades
from .words import axis_label, heading, note

RANGE = 0.2  # of the weights that share a colour
FEWEST = 5  # points that a density is drawn of
SHARES = (0.9, 0.6, 0.3)  # of the density that the lines enclose
GRID = 120
MOST_ALIKE = 0.999  # the correlation from which on points count as a line
SPREAD = 100.0  # between the largest value and the smallest, from which on a scale is symmetric-log


@picture(PathCollection, by="cmap")
def contours(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """Effect on the retain risk over effect on the forget risk: points, and lines of equal density.

    - `table`: `sample`, `risk` ("forget" and "retain") and `value`, as
      `geffect.analysis.instances` gives them. Optional: `weight`, one for each sample, `step`
      and `seed`.
    - `ax`, `cmap`, `xlim`, `ylim`, `title`, keywords of a scatter: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table without one of the
    risks, or with two rows in one place.

    Each range of weights has a colour, a darker one for larger weights; without the column
    `weight` there is one colour. A range of few samples has points alone. Samples that an objective
    should weigh most lie on the left (forgetting) and not below zero (damage). Steps and seeds are
    pooled.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"sample": [0, 0, 1, 1], "risk": ["forget", "retain"] * 2,
    ...                       "weight": [0.1, 0.1, 0.9, 0.9], "value": [-2.0, 0.1, -1.0, 0.2]})
    >>> ax = contours(table, ax=Figure().subplots())
    >>> [entry.get_text() for entry in ax.get_legend().get_texts()]
    ['0.0 to 0.2 (1)', '0.8 to 1.0 (1)']
    """
    require(table, ["sample", "risk", "value"])
    points = _points(table)
    ax = ax or new_axes(5.6, 3.8)
    # The scales come first: densities are estimated, and look even, on what is drawn.
    _scale(ax, "x", table[table["risk"] == FORGET])
    _scale(ax, "y", table[table["risk"] == RETAIN])
    ax.axvline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    ax.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    ranges = _ranges(points)
    # Reversed: the larger the weight, the darker.
    colours = asked.colours(mpl.colormaps["viridis_r"])(np.linspace(0, 1, len(ranges) + 3)[2:-1])
    reached, drawn = [np.zeros((1, 2)), points[[FORGET, RETAIN]].to_numpy(dtype=float)], []
    for (name, part), colour in zip(ranges.items(), colours, strict=True):
        ax.scatter(
            part[FORGET], part[RETAIN], **asked.look(s=9, color=colour, linewidth=0, zorder=3)
        )
        reached += _lines_of_density(ax, part, colour)
        drawn.append(Line2D([], [], color=colour, marker="o", label=name, **strokes(markersize=3)))
    _limit(ax, np.concatenate(reached))
    unit = score_of(table).full
    axis_label(ax.xaxis, f"forget: {unit}", longest=60)
    axis_label(ax.yaxis, f"retain: {unit}")
    dress(ax)
    heading(ax, constants(table.drop(columns="risk")))
    note(ax, "left: forgets; below zero: damages")
    if "weight" in table:
        key(ax, drawn, title="weight (samples)")
    return ax


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each sample and step, with both effects as columns."""
    place = [column for column in (*seed_in(table), "step", "sample") if column in table]
    once_only(table, [*place, "risk"])
    given = [*place, *(["weight"] if "weight" in table else [])]
    advice = "Pass directions of both to geffect.analysis.instances."
    require_names(table, "risk", (FORGET, RETAIN), advice)
    points = table.pivot(index=given, columns="risk", values="value")
    return points[[FORGET, RETAIN]].dropna().reset_index()


def _ranges(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The samples of each range of weights, in rising order, by what the range is called."""
    if "weight" not in points:
        return {f"{len(points)} samples": points}
    # What should be 0.6 may be a little less.
    number = np.floor(points["weight"] / RANGE + 1e-9)
    return {
        f"{RANGE * low:.1f} to {RANGE * (low + 1):.1f} ({len(part)})": part
        for low, part in points.groupby(number)
    }


def _lines_of_density(
    ax: Axes, points: pd.DataFrame, colour: tuple[float, float, float]
) -> list[NDArray[np.float64]]:
    """Lines around the given shares of a Gaussian density, and where they run.

    The density is estimated on the scales of the axes, with the kernel of Scott's rule. A few
    points, or points that lie on a line there, have none.
    """
    across, up = ax.xaxis.get_transform(), ax.yaxis.get_transform()
    x = across.transform(points[FORGET].to_numpy(dtype=float))
    y = up.transform(points[RETAIN].to_numpy(dtype=float))
    if len(points) < FEWEST or _on_a_line(x, y):
        return []
    import seaborn  # takes long to load

    seaborn.kdeplot(
        x=points[FORGET], y=points[RETAIN], ax=ax, levels=[1 - share for share in SHARES],
        gridsize=GRID, color=colour, zorder=2, **strokes(linewidths=1.0),
    )  # fmt: skip
    (lines,) = (artist for artist in ax.collections[-1:] if isinstance(artist, ContourSet))
    return [np.asarray(path.vertices, dtype=float) for path in lines.get_paths()]


def _on_a_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    """Whether points lie so close to a line that a grid over them would not see their width."""
    # Of equal values rounding may leave a spread that is not quite zero.
    if any(np.std(of) <= 1e-9 * np.abs(of).max() for of in (x, y)):
        return True
    return bool(abs(np.corrcoef(x, y)[0, 1]) > MOST_ALIKE)


def _limit(ax: Axes, reached: NDArray[np.float64]) -> None:
    """Shows all that is reached, with a margin that looks the same on either side of zero."""
    for axis, values, limit in (
        (ax.xaxis, reached[:, 0], ax.set_xlim),
        (ax.yaxis, reached[:, 1], ax.set_ylim),
    ):
        scale = axis.get_transform()
        low, high = scale.transform(np.array([values.min(), values.max()]))
        margin = 0.05 * (high - low) or 1.0
        low, high = scale.inverted().transform(np.array([low - margin, high + margin]))
        limit(low, high)


def _scale(ax: Axes, axis: Literal["x", "y"], table: pd.DataFrame) -> None:
    """Gives the axis the scale of the score, where the values are far enough apart for it."""
    frame = Frame.of(table.assign(model="model"))
    if score_of(table).scale != "symlog" or frame.limit < SPREAD * frame.threshold:
        return
    set_scale, of = (ax.set_xscale, ax.xaxis) if axis == "x" else (ax.set_yscale, ax.yaxis)
    set_scale("symlog", linthresh=frame.threshold, linscale=LINEAR_SHARE)
    Decades.put(of, frame.threshold, points("small"))
