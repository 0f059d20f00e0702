"""What forgetting costs: retain loss against forget loss, or another pair, along each run."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from .axes import dress
from .conventions import Asked, picture
from .figures import new_axes
from .fit import all_levels, constants, levels, once_only, require, seed_in
from .inks import METHOD, QUIET, SOLID, Ink, marks_of
from .legends import key
from .style import strokes
from .ticks import log_scale
from .words import axis_label, drawn, heading, note

NAMES = {
    "forget_nll": "forget NLL (nats per token)",
    "retain_nll": "retain NLL (nats per token)",
    "retain_heldout_authors_nll": "retain NLL outside (nats per token)",
    "recognition_taught": "recognition after the others were taught",
}
"""Columns in words, for the axes; others go by their own names."""


@picture(Line2D)
def tradeoff(
    table: pd.DataFrame,
    ax: Axes | None,
    asked: Asked,
    *,
    level: float | None = None,
    x: str = "forget_nll",
    y: str = "retain_nll",
) -> Axes:
    """A point a step, a line a variant, a marker a method; lower at equal forgetting is better.

    Of runs of a single step there are no lines, and none in the legend.

    - `table`: the losses of each run over its steps; rows with a true `at_level` stand out.
    - `level`: the forget loss of a model that was retrained without the forget data, in nats per
      token. Runs beyond it have forgotten more than retraining would.
    - `x`, `y`: other columns in place of forget and retain loss; `level` is then that of `x`.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"method": "npo", "variant": ["plain", "plain", "gru", "gru"],
    ...                       "step": [0, 5, 0, 5], "forget_nll": [0.1, 2.0, 0.1, 1.8],
    ...                       "retain_nll": [0.1, 1.5, 0.1, 0.4]})
    >>> ax = tradeoff(table, level=1.9, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['plain', 'gru']
    """
    require(table, ["method", "variant", "step", x, y])
    once_only(table, ["method", "variant", "step", *seed_in(table)])
    methods, variants = levels(table["method"]), levels(table["variant"])
    colours, marks = (
        asked.inks(all_levels(table["variant"])),
        marks_of(all_levels(table[METHOD]), by=METHOD),
    )
    variants = asked.order(variants, colours)
    # Of one method its dashes say nothing, and may tell the variants apart once more.
    is_one = len(methods) == 1
    ax = ax or new_axes(5.8, 3.8)
    log_scale(ax)
    lines = table.groupby([METHOD, "variant", *seed_in(table)], observed=True, sort=False)
    for (method, variant, *_), part in lines:
        if str(variant) not in variants:
            continue
        ink, mark, ordered = colours[str(variant)], marks[str(method)], part.sort_values("step")
        dashes = ink.dashes if is_one else mark.dashes
        forget, retain = ordered[x].to_numpy(), ordered[y].to_numpy()
        ax.plot(
            forget, retain,
            **asked.look(color=ink.colour, linestyle=dashes, linewidth=1.3, marker=mark.marker,
                         markersize=2.8, zorder=3),
        )  # fmt: skip
        if "at_level" in ordered:
            reached = ordered["at_level"].to_numpy(dtype=bool)
            ax.plot(
                forget[reached], retain[reached], color=ink.colour, linestyle="none",
                marker=mark.marker, markeredgecolor="white", zorder=4, **strokes(markersize=7.5),
            )  # fmt: skip
    if level is not None:
        mark_level(ax, level)
    axis_label(ax.xaxis, NAMES.get(x, drawn(x)))
    axis_label(ax.yaxis, NAMES.get(y, drawn(y)))
    dress(ax)
    heading(ax, constants(table[["method", "variant"]]))
    is_course = bool((lines.size() > 1).any())
    if is_course:
        of_variants = variant_samples(colours, variants, solid=not is_one)
    else:
        of_variants = variant_swatches(colours, variants)
    key(ax, [*of_variants, *method_samples(marks, methods, dashed=is_course)])
    return ax


def mark_level(ax: Axes, level: float, *, named: bool = True) -> None:
    """A line at the level, the region beyond shaded and, if wanted, named."""
    beyond = Rectangle(
        (level, 0.0), 1e4, 1.0, transform=ax.get_xaxis_transform(), color=QUIET, alpha=0.12,
        linewidth=0, zorder=0,
    )  # fmt: skip
    # As an artist and not as a patch it reaches past any data without stretching the axis to it.
    ax.add_artist(beyond)
    ax.axvline(level, color=QUIET, linewidth=0.8, zorder=1)
    if named:
        note(ax, "retrained without the forget data")


def variant_samples(colours: dict[str, Ink], names: Sequence[str], *, solid: bool) -> list[Artist]:
    """A stretch of each line for the legend."""
    return [
        Line2D([], [], color=colours[name].colour, label=name,
               linestyle=SOLID if solid else colours[name].dashes, **strokes(linewidth=1.5))
        for name in names
    ]  # fmt: skip


def variant_swatches(colours: dict[str, Ink], names: Sequence[str]) -> list[Artist]:
    """The colour of each variant for the legend, where runs are points and no lines."""
    return [Patch(color=colours[name].colour, linewidth=0, label=name) for name in names]


def method_samples(marks: dict[str, Ink], names: Sequence[str], *, dashed: bool) -> list[Line2D]:
    """Marker of each method for the legend, and its dashes, where there is more than one."""
    return [
        Line2D([], [], color=QUIET, linestyle=marks[name].dashes if dashed else "none",
               marker=marks[name].marker, label=name, **strokes(markersize=4))
        for name in names
        if len(names) > 1
    ]  # fmt: skip
