"""The one look of the figures: colours, line styles, scales and ticks.

Everything is passed to the artists it is meant for; the reader's own rcParams stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import count, pairwise
from textwrap import wrap
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, SymLogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2DBase, ScaledTranslation
from numpy.typing import NDArray

from geffect.places import tower_in
from geffect.scores import SAYS, score_of, scores_in
from geffect.text import plain

from .fit import blocks_in
from .ticks import has_glyph, log_scale, power

Dashes = Literal["-"] | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Ink:
    """Colour and dashes of a line: either alone tells it from its neighbours.

    The colours differ in lightness too, for paper printed grey.
    """

    colour: str
    dashes: Dashes = "-"
    marker: str = "o"


SOLID: Dashes = "-"
DASHED: Dashes = (0, (5, 1.6))
DOTTED: Dashes = (0, (1.1, 1.3))
DASH_DOT: Dashes = (0, (6, 1.5, 1.1, 1.5))
DASH_DOT_DOT: Dashes = (0, (6, 1.5, 1.1, 1.5, 1.1, 1.5))

DASHES = (SOLID, DASHED, DOTTED, DASH_DOT, DASH_DOT_DOT)

UNLEARNING, RETAINING = Ink("#b3261e", SOLID), Ink("#4a90d9", DASHED)
PLAIN = Ink("#333333", SOLID)
GRU = Ink("#00875f", DASHED)
GRU_UPDATE = Ink("#b0569b", DASH_DOT)
GRU_COORDINATE = Ink("#e08e0b", DOTTED)
SELECT = Ink("#5b4bb5", DASH_DOT_DOT)

NAMED = {
    "unlearning": UNLEARNING,
    "forget": UNLEARNING,
    "retaining": RETAINING,
    "retain": RETAINING,
    "original": Ink("#708090", DOTTED),
    "retrained": Ink("#0b7285", DASHED),
    "unlearned": Ink("#8c5a2b", SOLID),
    "objective": PLAIN,
    "plain": PLAIN,
    "gru": GRU,
    "gru-update": GRU_UPDATE,
    "gru-coordinate": GRU_COORDINATE,
    "select": SELECT,
    "unlearning, rectified": Ink(UNLEARNING.colour, DOTTED),
    "retaining, rectified": Ink(RETAINING.colour, DOTTED),
    "unlearning, update": Ink(UNLEARNING.colour, DASH_DOT),
    "retaining, update": Ink(RETAINING.colour, DASH_DOT),
}
# None of the colours above: a colour that stands for something stands for nothing else.
SPARE = (
    Ink("#1f3a8a", SOLID), Ink("#e5739d", DASHED), Ink("#a3a500", DASH_DOT),
    Ink("#6b8e9e", DOTTED), Ink("#c49a6c", DASH_DOT_DOT), Ink("#4d7c3a", DASHED),
)  # fmt: skip

UNDEFINED = "#bdbdbd"
QUIET = "#8a8a8a"
# Brown to purple: red and blue name the two effects, so the two signs take other hues.
DIVERGING: Colormap = mpl.colormaps["PuOr"].with_extremes(bad=UNDEFINED)
POSITIVE: Colormap = mpl.colormaps["viridis_r"].with_extremes(bad=UNDEFINED)
RATE: Colormap = mpl.colormaps["Purples"].with_extremes(bad=UNDEFINED)
NO_OR_YES: Colormap = ListedColormap(DIVERGING([0.5, 0.9])).with_extremes(bad=UNDEFINED)

DEPTH: Colormap = mpl.colormaps["viridis"]

LINEAR_SHARE = 0.8  # of a decade, on either side of zero, between the two logarithmic halves
MOST_DECADES = 6
ABREAST = 48  # characters of a heading on one line
LONGEST = 120  # characters of a label on several lines
SIDE = 0.85  # inches that a scale on the right takes, with its label
LEAST = 7.0  # points of the smallest text
NARROW = 5.0  # inches below which a picture has no room beside the data

EMBEDDED: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}
"""TrueType in PDF and PostScript, which journals ask for; text of an SVG that stays text."""


MEDIUM_TEXT = ("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize")
SMALL_TEXT = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")


@dataclass(frozen=True)
class Medium:
    """Where a picture will stand: its width in inches, its text in points, panels side by side."""

    width: float
    text: float
    abreast: int


MEDIA = {"column": Medium(3.3, 8.0, 1), "page": Medium(6.9, 8.5, 3), "slide": Medium(10.0, 15.0, 2)}

_MEDIUM: ContextVar[Medium | None] = ContextVar("medium", default=None)


@contextmanager
def style(name: Literal["column", "page", "slide"]) -> Iterator[None]:
    """A context whose pictures are made for print: of a width, with text that can be read there.

    - `name`: "column" is 3.3 inches wide, "page" 6.9, and "slide" 10.

    No text is smaller than 7 points. Pictures that are made inside of it have the width, whatever
    axes or panels they have; figures of your own get it as the default of matplotlib.

    >>> from geffect import plots
    >>> with plots.style("column"):
    ...     ax = plots.profile(pd.DataFrame({"step": 0, "layer": ["a", "b"], "value": [1.0, 2.0]}))
    >>> float(ax.figure.get_figwidth())
    3.3
    """
    if name not in MEDIA:
        raise ValueError(
            f"`name` should be {', '.join(map(repr, MEDIA))}. Found {name!r}. Choose one of those."
        )
    medium = MEDIA[name]
    settings = {
        **EMBEDDED,
        "figure.figsize": (medium.width, 0.62 * medium.width),
        **dict.fromkeys(MEDIUM_TEXT, medium.text),
        **dict.fromkeys(SMALL_TEXT, max(LEAST, 0.84 * medium.text)),
    }
    with mpl.rc_context(settings):
        token = _MEDIUM.set(medium)
        try:
            yield
        finally:
            _MEDIUM.reset(token)


def medium() -> Medium | None:
    """What pictures are made for, inside of `style`."""
    return _MEDIUM.get()


def is_narrow() -> bool:
    """Whether keys and scales have no room beside the data, and stand below."""
    made_for = medium()
    return made_for is not None and made_for.width < NARROW


def points(size: Literal["large", "medium", "small", "x-small"]) -> float:
    """The size of text in points: relative to that of the session, and readable."""
    return max(LEAST, float(FontProperties(size=size).get_size_in_points()))


class Picture(Figure):
    """A figure that saves its text as text."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with mpl.rc_context(EMBEDDED):
            super().savefig(*args, **kwargs)


def inks(names: Sequence[str]) -> dict[str, Ink]:
    """An ink a name: its own where it has one, else the spare ones in turn.

    Where these run out, their colours come again with other dashes.

    >>> inks(["unlearning", "alpha 1"])["alpha 1"] == SPARE[0]
    True
    """
    turns = ((ink, turn) for turn in count() for ink in SPARE)
    return {name: NAMED[name] if name in NAMED else _turned(*next(turns)) for name in names}


def _turned(ink: Ink, turns: int) -> Ink:
    return replace(ink, dashes=DASHES[(DASHES.index(ink.dashes) + turns) % len(DASHES)])


METHOD = "method"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def marks_of(names: Sequence[str], by: str) -> dict[str, Ink]:
    """Dashes and markers of names: methods have both of their own, other names the dashes.

    >>> marks_of(["ga", "npo"], by="method")["npo"].marker
    's'
    """
    if by != METHOD:
        return inks(names)
    return {
        name: replace(ink, dashes=DASHES[turn % len(DASHES)], marker=MARKERS[turn % len(MARKERS)])
        for turn, (name, ink) in enumerate(inks(names).items())
    }


def depth_colours(blocks: Sequence[str]) -> dict[str, str]:
    """A colour a block, from dark at the input to light at the output.

    One perceptual sequence, whose lightness rises: the ends are apart in grey too. The lightest
    tenth, which is hard to see on white, is left out.

    >>> depth_colours(["embedding", "head"])
    {'embedding': '#440154', 'head': '#bddf26'}
    """
    shares = np.linspace(0.0, 0.9, len(blocks))
    return {block: to_hex(DEPTH(share)) for block, share in zip(blocks, shares, strict=True)}


FRAMES = "frames"
"""The attribute of a table that is a panel among others: the frame of each unit."""


@dataclass(frozen=True)
class Frame:
    """What panels side by side share: the largest magnitude, where the scale turns linear, blocks.

    >>> table = pd.DataFrame({"layer": ["head"] * 3, "value": [-3e2, 0.0, 2e-4]})
    >>> Frame.of(table)
    Frame(limit=300.0, threshold=0.001, blocks=['head'])
    """

    limit: float
    threshold: float
    blocks: list[str]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Frame":
        """The frame handed on with the table by `framed`, else the table's own."""
        if said := table.attrs.get(FRAMES):
            return cls(**said[scores_in(table)[0].unit])
        magnitudes = table["value"].abs().to_numpy(dtype=float)
        magnitudes = magnitudes[np.isfinite(magnitudes) & (magnitudes > np.finfo(float).tiny)]
        largest = float(magnitudes.max(initial=0.0)) or 1.0
        # A few stray near-zeros would stretch the scale over decades that hold nothing.
        smallest = (
            float(np.quantile(magnitudes, 0.05, method="lower")) if magnitudes.size else largest
        )
        top = np.ceil(np.log10(largest))
        decade = np.clip(np.floor(np.log10(smallest)), top - MOST_DECADES, top - 1)
        limits = score_of(table).limits or (-largest, largest)
        return cls(max(map(abs, limits)), float(10.0**decade), blocks_in(table))


def framed(part: pd.DataFrame, whole: pd.DataFrame) -> pd.DataFrame:
    """The part, to be drawn on the scales of the whole, where it has a value to be scaled.

    Scales are those of the rows with the units of the part, blocks those of the whole.
    """
    if "value" not in whole:
        return part
    units = [score.unit for score in scores_in(part)]
    frames = {
        unit: asdict(replace(Frame.of(of_unit(whole, unit)), blocks=blocks_in(whole)))
        for unit in units
    }
    framed_part = part.copy()
    framed_part.attrs = {**whole.attrs, FRAMES: frames}
    return framed_part


def of_unit(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The rows whose values have this unit; all where the table names none."""
    return table[table["unit"].fillna("") == unit] if {*SAYS} <= {*table.columns} else table


def are_above_zero(table: pd.DataFrame) -> bool:
    """Whether values are of a score that is never negative, and none is zero.

    >>> weights = pd.DataFrame({"value": [0.1, 2.0], "score": "weight", "unit": "weight"})
    >>> are_above_zero(weights), are_above_zero(weights.assign(value=0.0))
    (True, False)
    """
    values = table["value"].dropna()
    return score_of(table).is_positive and len(values) > 0 and bool((values > 0).all())


def colours_of(table: pd.DataFrame) -> tuple[Colormap, Normalize]:
    """Map and norm: diverging and symmetric about zero, two colours where values are 0 or 1.

    >>> table = pd.DataFrame({"layer": ["embedding", "head"], "value": [-2.0, 0.5]})
    >>> cmap, norm = colours_of(table)
    >>> norm.vmin, norm.vmax
    (-2.0, 2.0)
    """
    score, frame = score_of(table), Frame.of(table)
    if are_above_zero(table):
        known = table["value"].to_numpy(dtype=float)
        known = known[np.isfinite(known)]
        return POSITIVE, LogNorm(known.min(), known.max() * (1 + 1e-9))
    if score.scale == "symlog":
        norm = SymLogNorm(
            linthresh=frame.threshold, linscale=LINEAR_SHARE, vmin=-frame.limit, vmax=frame.limit
        )
        return DIVERGING, norm
    if score.is_rate:
        return NO_OR_YES, Normalize(0.0, 1.0)
    return DIVERGING, Normalize(-frame.limit, frame.limit)


def decades(frame: Frame, most: int = 3) -> list[float]:
    """Ticks of a symmetric-log scale: zero and, from the threshold, `most` powers of ten a side.

    >>> decades(Frame(300.0, 1e-3, []))
    [-10.0, -0.1, -0.001, 0.0, 0.001, 0.1, 10.0]
    """
    # The small guard keeps a power of ten its own decade after the rounding of the logarithm.
    high = int(np.floor(np.log10(frame.limit) + 1e-9))
    low = int(np.round(np.log10(frame.threshold)))
    stride = max(1, -(-(high - low + 1) // most))
    powers = [float(f"1e{exponent}") for exponent in range(low, high + 1, stride)]
    return [*(-power for power in reversed(powers)), 0.0, *powers]


def few_decades(frame: Frame) -> list[float]:
    """Ticks of a short symmetric-log scale: zero, and one or two powers of ten a side.

    >>> few_decades(Frame(300.0, 1e-3, []))
    [-100.0, 0.0, 100.0]
    >>> few_decades(Frame(300.0, 1e-4, []))
    [-100.0, -0.1, 0.0, 0.1, 100.0]
    """
    high = int(np.floor(np.log10(frame.limit) + 1e-9))
    low = int(np.round(np.log10(frame.threshold)))
    exponents = [high] if high - low < 6 else [(high + low + 1) // 2, high]
    powers = [float(f"1e{exponent}") for exponent in exponents]
    return [*(-power for power in reversed(powers)), 0.0, *powers]


def decade_format() -> FuncFormatter:
    """How `decades` are written: as powers of ten, exponents no smaller than the rest."""
    return FuncFormatter(lambda value, _: power(value))


def value_axis(ax: Axes, table: pd.DataFrame) -> None:
    """Gives y the label, scale and limits of the table's score, and a line at zero.

    Weights have a logarithmic scale, where none of them is zero.

    Comes before the data: margins are those of the scale on which the data are added.
    """
    score, frame = score_of(table), Frame.of(table)
    axis_label(ax.yaxis, score.axis)
    if are_above_zero(table):
        log_scale(ax)
        return
    ax.axhline(0.0, color=QUIET, linewidth=0.6, zorder=1)
    if score.scale == "symlog":
        ax.set_yscale("symlog", linthresh=frame.threshold, linscale=LINEAR_SHARE)
        room = int(72 * _height(ax) / (1.7 * points("small")))
        ax.yaxis.set_major_locator(FixedLocator(decades(frame, max(1, min(3, (room - 1) // 2)))))
        ax.yaxis.set_major_formatter(decade_format())
        ax.yaxis.set_minor_locator(NullLocator())
        # Zero alone would be on view where all values are near it.
        ax.update_datalim([(0.0, -frame.threshold), (0.0, frame.threshold)], updatex=False)
    if score.limits:
        low, high = (100 * limit if score.is_rate else limit for limit in score.limits)
        margin = 0.03 * (high - low)  # a line that runs along the limit keeps its full width
        ax.set_ylim(low - margin, high + margin)


def all_blocks(table: pd.DataFrame) -> list[str]:
    """The blocks of the frame handed on with the table, else the table's own."""
    frames = table.attrs.get(FRAMES)
    return next(iter(frames.values()))["blocks"] if frames else blocks_in(table)


def units_of_sides(table: pd.DataFrame) -> list[str]:
    """The units of a table that a panel has room for: of effects, which have a sign, two."""
    found = {score.unit: score for score in scores_in(table)}
    have_signs = all(score.scale == "symlog" for score in found.values())
    return [*found] if have_signs and len(found) == 2 else [score_of(table).unit]


def value_axes(ax: Axes, table: pd.DataFrame, units: Sequence[str]) -> dict[str, Axes]:
    """The axes of each unit: y on the left, and of a second one on the right.

    Comes before the data, as `value_axis` does.
    """
    if len(units) == 1:
        value_axis(ax, table)
        return {units[0]: ax}
    sides = {unit: ax.twinx() if index else ax for index, unit in enumerate(units)}
    for unit, side in sides.items():
        own = of_unit(table, unit)
        value_axis(side, own)
        if FRAMES in table.attrs:  # panels whose sides are not joined have the same limits
            reach = 1.2 * Frame.of(own).limit
            side.set_ylim(-reach, reach)
    return sides


def dress_sides(sides: Iterable[Axes]) -> None:
    """Dresses the axes of `value_axes` when they have their data: zero is at one height."""
    left, *others = sides
    dress(left)
    for right in others:
        dress(right)
        right.spines["right"].set(visible=True, linewidth=0.6)
        right.spines["left"].set_visible(False)
    for side in (left, *others) if others else ():
        reach = max(map(abs, side.get_ylim()))
        side.set_ylim(-reach, reach)


def step_axis(ax: Axes) -> None:
    """Gives x its label and whole-numbered ticks."""
    axis_label(ax.xaxis, "optimizer step")
    ax.xaxis.set_major_locator(
        MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )


def thinned(count: int, most: int = 20) -> list[int]:
    """At most `most` evenly spaced indices out of `count`, the first and the last among them.

    >>> thinned(34)[:3], thinned(34)[-2:]
    ([0, 2, 4], [30, 33])
    """
    stride = max(1, -(-count // most))
    indices = list(range(0, count, stride))
    if indices and indices[-1] != count - 1:
        # The last one is too close to its neighbour to stand beside it: it takes its place.
        indices[-1] = count - 1
    return indices


def new_axes(width: float = 5.6, height: float = 3.4, *, named: int = 4) -> Axes:
    """Axes alone on a new figure, which reserves room for whatever is outside of them.

    `named` is how many lines a key has: in a narrow medium it stands below.
    """
    figure = pyplot.figure(
        figsize=_size(width, height, named), layout="constrained", FigureClass=Picture
    )
    return figure.subplots()


def rows_and_columns(panels: int, most: int) -> tuple[int, int]:
    """How many rows and columns panels stand in: at most so many, and what the medium takes.

    >>> rows_and_columns(4, 3)
    (2, 2)
    """
    made_for = medium()
    rows = -(-panels // (min(most, made_for.abreast) if made_for else most))
    return rows, -(-panels // rows)


def new_figure(width: float, height: float) -> Figure:
    """A figure that is the caller's alone: to be saved, or returned by a notebook cell."""
    figure = pyplot.figure(figsize=_size(width, height), layout="constrained", FigureClass=Picture)
    # Held by pyplot, a notebook would show it a second time and a script would pile them up;
    # made without pyplot, the first one of a notebook would not be shown at all.
    pyplot.close(figure)
    return figure


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes are on, from now on the caller's alone."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    pyplot.close(figure)  # which pyplot would keep
    return figure


def _size(width: float, height: float, named: int = 0) -> tuple[float, float]:
    """The size in inches: as it is asked for, or of the medium's width and about as upright."""
    if (made_for := medium()) is None:
        return width, height
    below = 0.15 + 0.08 * min(named, 14) if is_narrow() else 0.0
    return made_for.width, height * (1 + made_for.width / width) / 2 + below


def colour_bar(ax: Axes, mesh: ScalarMappable, label: str, also: str = "") -> Colorbar:
    """The scale of the colours: on the right, or where that has no room below.

    What is said `also` stands on a line of its own.
    """
    assert ax.figure is not None
    is_below = is_narrow()
    place = {"location": "bottom", "aspect": 34} if is_below else {"aspect": 28, "fraction": 0.06}
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, **place)
    room = 34
    if medium():
        length = _width(ax) if is_below else _height(ax)
        room = min(LONGEST if is_below else 34, int(72 * length / (0.56 * points("medium"))))
    axis = bar.ax.xaxis if is_below else bar.ax.yaxis
    lines = [wrapped(label, max(12, room)), also]
    axis.set_label_text("\n".join(filter(None, lines)), fontsize=points("medium"))
    if is_below:
        bar.locator = MaxNLocator(nbins=4, steps=[1, 2, 5, 10])
        bar.update_ticks()
    bar.ax.minorticks_off()
    bar.ax.tick_params(width=0.6, length=2.5, labelsize=points("small"))
    bar.outline.set_visible(False)
    return bar


def dress(ax: Axes, *, frame: bool = True) -> None:
    """Takes away the spines that carry no ticks, or all of them, and thins what stays."""
    seaborn.despine(ax=ax, left=not frame, bottom=not frame)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)
    ax.tick_params(width=0.6, length=2.5, labelsize=points("small"))
    ax.tick_params(which="minor", width=0.4, length=1.5, labelsize=points("small"))


def _height(ax: Axes) -> float:
    """About how tall axes are, in inches, with what else the layout may put there."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    height = float(figure.get_figheight() * ax.get_position().height)
    return 0.85 * height if medium() else height


def key(ax: Axes, handles: Sequence[Artist], *, offset: float = 0.0, title: str = "") -> Legend:
    """The legend of the handles: `offset` inches to the right of the data, or where that has no
    room below it."""
    assert ax.figure is not None
    labels = [drawn(handle.get_label()) for handle in handles]
    if is_narrow():
        place: dict[str, Any] = {
            "bbox_to_anchor": (0.0, -0.5),
            "bbox_transform": _Below(ax),
            "ncols": abreast([*labels, title], 72 * _width(ax)),
        }
    else:
        to_the_right = ScaledTranslation(offset, 0, ax.figure.dpi_scale_trans)
        place = {"bbox_to_anchor": (1.01, 1.0), "bbox_transform": ax.transAxes + to_the_right}
    legend = ax.legend(
        handles=list(handles),
        labels=["" for _ in handles],
        loc="upper left",
        borderaxespad=0.0,
        title=title or None,
        **LEGEND,
        **place,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_fontsize(points("small"))
    write_labels(legend, labels)
    return legend


LEGEND: dict[str, Any] = {
    "frameon": False, "handlelength": 2.6, "columnspacing": 1.4, "alignment": "left"
}  # fmt: skip


def abreast(labels: Sequence[str], room: float) -> int:
    """How many labels of a legend stand side by side in so many points.

    >>> abreast(["unlearning", "retaining"], 240.0)
    2
    """
    size = points("small")
    wide = (2.6 + 0.8 + 1.4 + 0.62 * max(map(len, labels), default=0)) * size
    return max(1, min(len(labels), int(room / wide)))


class _Below(Affine2DBase):
    """Points from the lower left corner of axes with all that is written below them."""

    def __init__(self, ax: Axes) -> None:
        super().__init__()
        self._ax = ax
        self.set_children(ax.transAxes)

    def get_matrix(self) -> NDArray[np.float64]:
        figure = self._ax.get_figure(root=True)
        assert figure is not None
        inside, scale = self._ax.bbox, figure.dpi / 72
        written = self._ax.xaxis.get_tightbbox()
        low = inside.y0 if written is None else min(inside.y0, written.y0)
        self._invalid = 0  # or nobody would be told when the axes move again
        return np.array([[scale, 0.0, inside.x0], [0.0, 10 * scale, low], [0.0, 0.0, 1.0]])


def _width(ax: Axes) -> float:
    """About how wide axes are, in inches, before anything is laid out."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    width = float(figure.get_figwidth() * ax.get_position().width)
    return 0.85 * width if medium() and width < 4 else width  # labels beside it take their share


def write_labels(legend: Legend, labels: Iterable[str]) -> None:
    """Give a legend its labels, also those that matplotlib leaves out: they begin with `_`."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def towers_apart(line: Callable[..., Line2D], blocks: Sequence[str]) -> None:
    """Separates the blocks of different towers, by `ax.axvline` or `ax.axhline` between them."""
    towers = list(map(tower_in, blocks))
    for index, (before, after) in enumerate(pairwise(towers), start=1):
        if before != after:
            line(index - 0.5, color="white", linewidth=5, zorder=4)
            line(index - 0.5, color=QUIET, linewidth=0.6, zorder=5)


def heading(ax: Axes, text: str) -> None:
    """What the panel shows, above its left edge."""
    room = min(ABREAST, int(72 * _width(ax) / (0.55 * points("medium"))))
    ax.set_title(_on_lines(text, room), loc="left", fontsize=points("medium"))
    if beside := ax.get_title(loc="right"):
        note(ax, beside)


def title(figure: Figure, text: str) -> None:
    """What the figure shows, above its panels."""
    room = min(LONGEST, int(72 * figure.get_figwidth() / (0.6 * points("large"))))
    figure.suptitle(_on_lines(text, room), fontsize=points("large"))


def note(ax: Axes, text: str) -> None:
    """How to read the panel, small, above its right edge."""
    left = ax.get_title(loc="left").rstrip("\n")
    room, small = 72 * _width(ax), 0.56 * points("x-small")
    lines = _lines(text.replace("\n", " "), max(12, int(room / small))) or [""]
    beside = max(printed(line, points("medium")) for line in left.split("\n"))
    beside += max(printed(line, points("x-small")) for line in lines)
    lifted = len(lines) if left and beside + 6 > room else len(lines) - 1
    ax.set_title(left + "\n" * lifted, loc="left", fontsize=points("medium"))
    ax.set_title("\n".join(lines), loc="right", fontsize=points("x-small"), color="#555555")


@cache
def printed(text: str, size: float) -> float:
    """How wide a line of text is, in points."""
    width, _, _ = text_to_path.get_text_width_height_descent(
        text.replace(r"\$", "$"), FontProperties(size=size), ismath=False
    )
    return float(width)


def drawn(text: object, most: int = 36) -> str:
    """Text that others wrote, for a picture: no mathematics, and no longer than a picture is wide.

    What does not print, or is in none of the fonts, is written as its code.

    >>> print(drawn("$x^$\\n\\x1b"), drawn("a" * 99, most=9))
    \\$x^\\$\\n\\x1b aaaa…aaaa
    """
    return _short(text, most).replace("$", r"\$")


def _short(text: object, most: int) -> str:
    written = plain(text)
    written = "".join(c if c.isascii() or has_glyph(c) else _code(c) for c in written)
    if len(written) <= most:
        return written
    return f"{written[: most // 2]}…{written[-(most // 2) :]}"


def _on_lines(text: object, width: int) -> str:
    """The text on two lines of a width, at most; they are cut before anything is escaped."""
    return "\n".join(drawn(line, width) for line in _lines(_short(text, 2 * width), width))


def _lines(text: str, width: int) -> list[str]:
    """The text on lines of a width: a G-effect is one word."""
    return wrap(text, width, break_on_hyphens=False)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def longest(names: Iterable[str]) -> int:
    """The characters of the longest name as it is drawn."""
    return max(len(drawn(name)) for name in names)


def rate(table: pd.DataFrame) -> str:
    """In how many rows a value of 0 or 1 is 1, in words.

    >>> rate(pd.DataFrame({"value": [1.0, 0.0, 0.0, np.nan]}))
    'rate 33 % of 3'
    """
    known = table["value"].dropna()
    return f"rate {100 * known.mean():.0f} % of {len(known)}" if len(known) else "undefined"


def wrapped(label: str, most: int = 34) -> str:
    """The label on lines short enough to stand beside a panel, the unit on its own.

    >>> wrapped("retaining G-effect (nats per token per step)").splitlines()
    ['retaining G-effect', '(nats per token per step)']
    """
    if len(label) <= most:
        return drawn(label, most)
    words, bracket, unit = plain(label).partition(" (")
    parts = [_short(part, LONGEST) for part in (words, bracket.strip() + unit) if part]
    return "\n".join(drawn(line) for part in parts for line in _lines(part, most))


def axis_label(axis: Axis, text: str, longest: int = 34) -> None:
    """What an axis shows, on lines no longer than the axis is."""
    is_x = isinstance(axis, XAxis)
    room = longest
    if medium():
        length = _width(axis.axes) if is_x else _height(axis.axes)
        room = int(72 * length / (0.52 * points("medium")))
    axis.set_label_text(wrapped(text, max(12, min(longest, room))), fontsize=points("medium"))
