"""Values as lines: over the depth of the network, and over the steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geffect.scores import blocks_of, score_of, scores_in
from geffect.spans import Floats, envelope, thinned_course

from .axes import dress_sides, step_axis, towers_apart, value_axes
from .conventions import Asked, coloured, picture
from .figures import new_axes
from .fit import (
    SEED,
    all_levels,
    blocks_in,
    constants,
    has_intervals,
    levels,
    names_in,
    require,
    seed_in,
    short,
    told_apart,
)
from .frames import all_blocks, units_of_sides
from .inks import METHOD, QUIET, Ink, depth_colours, marks_of
from .legends import SIDE, key
from .long import rolling_median, rolling_rate, spans_of, window
from .style import points
from .ticks import BlockTicks, thinned
from .words import axis_label, drawn, heading, longest, note, rate

FEW = 12
"""Lines up to which each has its own band."""

MANY, BUNDLES = 40, 8
"""Long courses up to which each is drawn, and how many bundles of neighbours there are of more."""


@picture(Line2D)
def profile(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """Median over the steps at each block, input on the left; the band holds the middle half.

    Of a score that is 0 or 1 it is the rate: in how many of the steps it is 1, without a band.

    - `table`: `step`, one column of blocks, `value`, and at most two columns that tell rows apart.
      Optional: `seed`, and `low` and `high`.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of more than one panel.

    Each effect or run has a line: the first column that tells rows apart gives the colour, the last
    the dashes; of methods and variants always the variant the colour. Of several seeds a line is
    the mean, and the band the range of the seeds. A gap separates the towers of a model. Of two
    units, such as those of gradients and of updates, each has a scale: the second on the right,
    with zero at the same height.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [-1.0, 2.0]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> ax = profile(table, ax=Figure().subplots())
    >>> ax.lines[-1].get_ydata().tolist()
    [-2.0, 1.5]
    """
    several = told_apart(table, most=2)
    block, blocks = blocks_of(table), all_blocks(table)
    names = short(blocks)
    units = units_of_sides(table)
    spare = SIDE * (len(units) - 1)
    lines = list(lines_of(table, several, asked))
    tall = 3.0 + 0.04 * longest(names)
    ax = ax or new_axes(5.6 + 2 * spare, tall, named=len(lines) * len(units))
    sides = value_axes(ax, table, units)
    handles = []
    at = range(len(blocks))
    for name, ink, part in lines:
        side = sides[score_of(part).unit]
        middle, band = _over_depth(part, block)
        handles += side.plot(
            at, middle.reindex(blocks).to_numpy(dtype=float),
            label=name if side is ax else f"{name} (right)",
            **asked.look(color=ink.colour, linestyle=ink.dashes, linewidth=1.3,
                         marker=ink.marker if len(blocks) <= 40 else "", markersize=3, zorder=3),
        )  # fmt: skip
        if band is not None:
            low, high = (end.reindex(blocks).to_numpy(dtype=float) for end in band)
            fill(side, at, low, high, handles[-1].get_color())
    towers_apart(ax.axvline, blocks)
    BlockTicks.put(ax.xaxis, [*map(drawn, names)], points("small"), most=14)
    ax.set_xlim(-0.5, len(blocks) - 0.5)
    axis_label(ax.xaxis, f"{block}, from input to output")
    dress_sides(sides.values())
    heading(ax, constants(table))
    if said := _said_of_depth(table):
        note(ax, said)
    if several:
        key(ax, handles, offset=spare)
    return ax


def _over_depth(
    part: pd.DataFrame, block: str
) -> tuple[pd.Series, tuple[pd.Series, pd.Series] | None]:
    """What a line is at each block, and its band: the range of the seeds, the interval of a single
    step, or the middle half of the steps."""
    is_rate = score_of(part).is_rate
    each = part.groupby([block, *seed_in(part)], observed=True)["value"]
    middle = 100 * each.mean() if is_rate else each.median()
    if seed_in(part):
        of_seeds = middle.unstack(SEED)
        return of_seeds.mean(axis=1), (of_seeds.min(axis=1), of_seeds.max(axis=1))
    if is_rate:
        return middle, None
    if part["step"].nunique() == 1 and has_intervals(part):
        ends = part.set_index(block)
        return middle, (ends["low"], ends["high"])
    return middle, (each.quantile(0.25), each.quantile(0.75))


def _said_of_depth(table: pd.DataFrame) -> str:
    """How lines and bands of a profile are read."""
    steps, is_rate = table["step"].nunique() > 1, all(score.is_rate for score in scores_in(table))
    middle = ("rate over steps" if is_rate else "median over steps") if steps else ""
    if seed_in(table):
        return "; ".join(filter(None, [middle, f"band: range of {table[SEED].nunique()} seeds"]))
    if not steps and has_intervals(table):
        return "band: bootstrap interval"
    return middle if is_rate or not steps else "median and quartiles over steps"


@picture(Line2D)
def trajectory(
    table: pd.DataFrame, ax: Axes | None, asked: Asked, *, smooth: int | None = None
) -> Axes:
    """The value over the steps: a line for each block, or of one block for each effect or run.

    Of a score that is 0 or 1 there is no line for a block, but one for their rate at each step.

    - `table`: `step`, one column of blocks and `value`; of one block also columns that tell rows
      apart. Optional: `seed`, and `low` and `high`.
    - `smooth`: of how many steps a line is the median; 1 for the values as they are. From 300 steps
      on a hundredth of them if left out. A band behind it holds all values.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of more than one panel.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> from geffect.scores import Score, tidy
    >>> table = tidy(np.array([[-3.0, 1.0], [-1.0, 2.0]]), Score("G-effect", "nats"),
    ...              steps=np.array([0, 5]), blocks=["embedding", "head"], by="layer")
    >>> ax = trajectory(table, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['embedding', 'head']
    """
    require(table, ["step", "value"])
    present = blocks_in(table)
    courses = _courses(table, present, asked)
    many = len(courses)
    units = units_of_sides(table)
    spare = SIDE * (len(units) - 1)
    ax = ax or new_axes(5.6 + 2 * spare, named=len(courses) * len(units))
    sides = value_axes(ax, table, units)
    # An undefined value at either end is no reason to hide that its step was captured.
    ends = [(table["step"].min(), 0.0), (table["step"].max(), 0.0)]
    ax.update_datalim(ends, updatey=ax.get_yscale() != "log")
    rates = all(course.is_rate for course in courses)
    over = window(table["step"].nunique(), rates=rates) if smooth is None else smooth
    if of_all := over > 1 and len(courses) > FEW:
        for unit, side in sides.items():
            raw = pd.concat([course.values for course in courses if course.unit == unit], axis=1)
            fill(side, *envelope(*_arrays(raw), spans_of(ax)), color=QUIET)
        if len(courses) > MANY:
            courses = _bundled(courses)
    few = len(courses) <= FEW and not of_all
    handles = [_draw(sides[course.unit], course, over, few, asked) for course in courses]
    for course, handle in zip(courses, handles, strict=True):
        handle.set_label(course.name + (" (right)" if sides[course.unit] is not ax else ""))
    step_axis(ax)
    dress_sides(sides.values())
    block_alone = present if len(present) == 1 else []
    heading(ax, ", ".join(filter(None, [constants(table), *block_alone])))
    if said := _said_of_courses(table, courses, over, many):
        note(ax, said)
    if len(courses) > 1:
        shown = [handles[index] for index in thinned(len(handles), most=14)]
        key(ax, shown, offset=spare)
    return ax


@dataclass(frozen=True)
class Course:
    """A value over the steps: what it is of, and its band where the table has one."""

    name: str
    ink: Ink
    unit: str
    values: pd.Series
    band: tuple[pd.Series, pd.Series] | None = None
    is_rate: bool = False


def _courses(table: pd.DataFrame, present: Sequence[str], asked: Asked) -> list[Course]:
    """A course for each block, or of one block and of rates for each effect or run."""
    rates = all(score.is_rate for score in scores_in(table))
    of_blocks = len(present) > 1 and not rates
    several = told_apart(table, most=0 if of_blocks else 2)
    if not of_blocks:
        return [_course(*line) for line in lines_of(table, several, asked)]
    block, everywhere = blocks_of(table), all_blocks(table)
    colours = depth_colours(everywhere)
    if asked.palette is not None:
        colours = coloured(everywhere, asked.palette)
    labels = dict(zip(present, short(present), strict=True))
    named = asked.order(present, everywhere)
    unit = score_of(table).unit
    if seed_in(table) or has_intervals(table):
        parts = {str(name): part for name, part in table.groupby(block, observed=True)}
        return [_course(labels[name], Ink(colours[name]), parts[name]) for name in named]
    # Hundreds of courses are read in one go.
    grid = table.pivot(index="step", columns=block, values="value")
    grid.columns = grid.columns.astype(str)
    return [Course(labels[name], Ink(colours[name]), unit, grid[name]) for name in named]


def _course(name: str, ink: Ink, part: pd.DataFrame) -> Course:
    """The mean of what shares a step: of seeds, whose range is the band, and blocks of a rate."""
    score = score_of(part)
    times = 100.0 if score.is_rate else 1.0
    each = times * part.groupby(["step", *seed_in(part)])["value"].mean()
    if seed_in(part):
        of_seeds = each.unstack(SEED)
        values, band = of_seeds.mean(axis=1), (of_seeds.min(axis=1), of_seeds.max(axis=1))
        return Course(name, ink, score.unit, values, band, score.is_rate)
    if has_intervals(part) and not score.is_rate:
        ends = part.set_index("step").sort_index()
        return Course(name, ink, score.unit, each, (ends["low"], ends["high"]))
    return Course(name, ink, score.unit, each, None, score.is_rate)


def _bundled(courses: Sequence[Course]) -> list[Course]:
    """Courses of neighbours as their median: hundreds would cover each other."""
    bundles = []
    for part in np.array_split(np.arange(len(courses)), BUNDLES):
        of = [courses[place] for place in part]
        values = pd.concat([course.values for course in of], axis=1).median(axis=1)
        name = " … ".join(shorten(course.name) for course in (of[0], of[-1]))
        bundles.append(replace(of[len(of) // 2], name=name, values=values, band=None))
    return bundles


def shorten(name: str, most: int = 16) -> str:
    """The beginning of a name, where layers have their number."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _draw(ax: Axes, course: Course, over: int, few: bool, asked: Asked) -> Line2D:
    """The line of a course, and behind it its band, or that of the values that it smooths."""
    steps, raw = _arrays(course.values.to_frame())
    count = spans_of(ax)
    smooth = rolling_rate if course.is_rate else rolling_median
    values = smooth(course.values, over).to_numpy(dtype=float)
    is_short = few and len(steps) <= 40
    (line,) = ax.plot(
        *thinned_course(steps, values, count),
        **asked.look(color=course.ink.colour, linestyle=course.ink.dashes,
                     linewidth=1.2 if few else 0.7, marker=course.ink.marker if is_short else "",
                     markersize=2, zorder=3),
    )  # fmt: skip
    if few and course.band is not None:
        low, high = (end.to_numpy(dtype=float) for end in course.band)
        _, low, _ = envelope(steps, low[:, np.newaxis], count)
        x, _, high = envelope(steps, high[:, np.newaxis], count)
        fill(ax, x, low, high, line.get_color())
    elif few and over > 1 and not course.is_rate:
        fill(ax, *envelope(steps, raw, count), color=line.get_color())
    return line


def _arrays(courses: pd.DataFrame) -> tuple[Floats, Floats]:
    return courses.index.to_numpy(dtype=float), courses.to_numpy(dtype=float)


def fill(ax: Axes, at: Sequence[float] | Floats, low: Floats, high: Floats, color: Any) -> None:
    """A band behind a line."""
    ax.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)


def _said_of_courses(table: pd.DataFrame, courses: Sequence[Course], over: int, many: int) -> str:
    """How lines and bands of a trajectory are read."""
    rates = all(course.is_rate for course in courses)
    said = []
    if rates:
        said.append(rate(table) if len(blocks_in(table)) == 1 else f"of the blocks; {rate(table)}")
    if over > 1:
        of = f" and {many // len(courses)} {blocks_of(table)}s" if len(courses) < many else ""
        said.append(f"{'rate' if rates else 'median'} of {over} steps{of}")
    if many <= FEW and any(course.band for course in courses):
        seeds = table[SEED].nunique() if seed_in(table) else 0
        said.append(f"mean and range of {seeds} seeds" if seeds else "band: bootstrap interval")
    elif over > 1 and not rates:
        said.append("band: all values")
    return "; ".join(said)


def lines_of(
    table: pd.DataFrame, several: Sequence[str], asked: Asked
) -> Iterator[tuple[str, Ink, pd.DataFrame]]:
    """Name, ink and rows of each line: coloured by the first column, dashed by the last."""
    if not several:
        names = [held[0] for held in names_in(table).values()] or [""]
        yield ", ".join(names), asked.inks(names)[names[0]], table
        return
    hue, mark = several[0], several[-1]
    if hue == METHOD:
        hue, mark = mark, hue
    known = all_levels(table[hue])
    colours, marks = asked.inks(known), marks_of(all_levels(table[mark]), by=mark)
    parts = {
        tuple(map(str, key_of)): part
        for key_of, part in table.groupby(list(several), observed=True, sort=False)
    }
    of_hue, of_mark = several.index(hue), several.index(mark)
    for name in asked.order(levels(table[hue]), known):
        for told, part in parts.items():
            if told[of_hue] == name:
                look = marks[told[of_mark]]
                ink = replace(look, colour=colours[name].colour)
                yield ", ".join(told), ink, part
