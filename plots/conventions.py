"""What every picture takes: colours and their order, limits, a title, words for its artist.

A picture on axes is called `name(table, *, ax=None, palette=None, hue_order=None, xlim=None,
ylim=None, title=None, **keywords)`, or with `cmap` in the place of the two where a colour stands
for a number:

- `ax`: the axes to draw on; new ones if left out.
- `palette`: the colours of the names: a palette that seaborn knows, a colour for each name in turn,
  or a dictionary from names to colours.
- `hue_order`: the names in the order in which they are drawn and listed; others are left out.
- `cmap`: a colour map, or its name in matplotlib or seaborn.
- `xlim`, `ylim`: the two ends of an axis; None for one that follows the data.
- `title`: stands above the picture, in the place of what the table is of.
- `keywords`: go to the artist, such as `linewidth` to lines, and win over what is ours.

`picture` makes such a function of one that draws.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from math import isfinite
from numbers import Real
from typing import Any, Literal, Protocol

import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist, ArtistInspector
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text

from geffect.near import meant

from .inks import UNDEFINED, Ink, inks
from .style import strokes
from .words import heading

Palette = str | Sequence[Any] | Mapping[str, Any]
Limits = tuple[float | None, float | None]
By = Literal["palette", "cmap"]

TAKEN: Mapping[type[Artist], tuple[str, frozenset[str]]] = {
    Line2D: ("a line", frozenset()),
    QuadMesh: ("a mesh", frozenset({"shading", "vmin", "vmax"})),
    PathCollection: ("a scatter", frozenset({"s", "marker"})),
    Text: ("a text", frozenset()),
}
"""What the artists of our pictures are called, and what they take when made, beside their own."""

OURS = frozenset(
    {
        *("array", "axes", "data", "figure", "label", "offsets", "paths", "position", "text"),
        *("x", "xdata", "xy", "y", "ydata"),
    }
)
"""Words of artists that would draw something else than the table, or name it otherwise."""


def taken(artist: type[Artist]) -> frozenset[str]:
    """The keywords that the artist takes and that leave the data as they are."""
    _, further = TAKEN[artist]
    inspected = ArtistInspector(artist)
    return (frozenset(inspected.get_setters()) | further) - OURS


class Draws(Protocol):
    """A picture on axes, as its users call it."""

    __name__: str

    def __call__(
        self,
        table: pd.DataFrame,
        *,
        ax: Axes | None = None,
        xlim: Limits | None = None,
        ylim: Limits | None = None,
        title: str | None = None,
        **keywords: Any,
    ) -> Axes: ...


@dataclass(frozen=True)
class Asked:
    """What a caller asks for beside the table and the axes."""

    palette: Palette | None = None
    hue_order: Sequence[str] | None = None
    cmap: str | Colormap | None = None
    xlim: Limits | None = None
    ylim: Limits | None = None
    title: str | None = None
    words: Mapping[str, Any] = field(default_factory=dict)

    def inks(self, names: Sequence[str]) -> dict[str, Ink]:
        """An ink a name, in the colours of the palette."""
        ours = inks(names)
        if self.palette is None:
            return ours
        colours = coloured(names, self.palette)
        return {name: replace(ours[name], colour=colours[name]) for name in names}

    def order(self, present: Sequence[str], known: Collection[str] = ()) -> list[str]:
        """The names that are drawn, in the order in which they are.

        `known` are names of other panels too, which may be asked for and are not here.
        """
        return in_order(present, self.hue_order, known)

    def colours(self, ours: Colormap) -> Colormap:
        """The colour map that is asked for, else ours; grey where a value is undefined."""
        return ours if self.cmap is None else colour_map(self.cmap)

    def mesh(self, cmap: Colormap, norm: Normalize, **ours: Any) -> dict[str, Any]:
        """The keywords of a mesh, whose scale is the caller's as far as he says."""
        words = dict(self.words)
        ends = {end: words.pop(end) for end in ("vmin", "vmax") if end in words}
        ours = {"cmap": self.colours(cmap), "norm": copy(norm), **ours, **words}
        for end, value in ends.items():
            setattr(ours["norm"], end, value)
        return ours

    def look(self, **ours: Any) -> dict[str, Any]:
        """The keywords of an artist: ours, and over them those of the caller.

        >>> Asked(words={"linewidth": 2}).look(linewidth=1.3, color="red")
        {'linewidth': 2, 'color': 'red'}
        """
        return {**strokes(**ours), **self.words}


def picture(artist: type[Artist], by: By = "palette") -> Callable[[Callable[..., Axes]], Draws]:
    """Makes a picture as it is called of `draw(table, ax, asked)`, which returns its axes.

    - `artist`: what keywords go to.
    - `by`: "palette" where colours are of names, "cmap" where they are of numbers.

    Parameters of `draw` that are keywords alone are the picture's own.
    """
    conventions = [*(["palette", "hue_order"] if by == "palette" else ["cmap"])]
    conventions += ["xlim", "ylim", "title"]

    def made(draw: Callable[..., Axes]) -> Draws:
        kinds = signature(draw).parameters
        own = [found for found in kinds.values() if found.kind is Parameter.KEYWORD_ONLY]
        name = draw.__name__

        @wraps(draw)
        def called(table: pd.DataFrame, *, ax: Axes | None = None, **given: Any) -> Axes:
            extra = {of.name: given.pop(of.name) for of in own if of.name in given}
            asked = {word: given.pop(word, None) for word in conventions}
            words = _words(name, artist, given, [*conventions, *(of.name for of in own)])
            drawn = draw(table, ax, Asked(**asked, words=words), **extra)
            return finish(drawn, asked["xlim"], asked["ylim"], asked["title"])

        keyword = [Parameter(word, Parameter.KEYWORD_ONLY, default=None) for word in conventions]
        shown = [
            Parameter("table", Parameter.POSITIONAL_OR_KEYWORD, annotation=pd.DataFrame),
            Parameter("ax", Parameter.KEYWORD_ONLY, default=None),
            *keyword,
            *own,
            Parameter("keywords", Parameter.VAR_KEYWORD),
        ]
        called.__signature__ = Signature(shown, return_annotation=Axes)  # type: ignore[attr-defined]
        return called

    return made


def _words(
    picture: str, artist: type[Artist], given: Mapping[str, Any], own: Sequence[str]
) -> dict[str, Any]:
    """The keywords by their full names. Raises TypeError for one that the artist does not take."""
    called, _ = TAKEN[artist]
    try:
        words = normalize_kwargs(dict(given), artist)
    except TypeError as error:
        raise TypeError(
            f"`{picture}` should be given each keyword once. Found two names of one: {error}. "
            "Leave one out."
        ) from None
    accepted = taken(artist) if words else frozenset()
    for word in words:
        if word not in accepted:
            raise TypeError(
                f"`{picture}` should be given {', '.join(own)}, or keywords of {called}. Found "
                f"`{word}`.{meant(word, [*own, *sorted(accepted)])} Leave it out, or set it "
                "on the axes that are returned."
            )
    return words


def coloured(names: Sequence[str], palette: Palette) -> dict[str, str]:
    """A colour a name. Raises ValueError where there are not enough of them.

    >>> coloured(["ga", "npo"], {"npo": "red", "ga": "#0000ff"})
    {'ga': '#0000ff', 'npo': '#ff0000'}
    """
    if isinstance(palette, Mapping):
        missing = [name for name in names if name not in palette]
        if missing:
            raise ValueError(
                f"`palette` should have a colour for each of {', '.join(names)}. Found none of "
                f"{', '.join(missing)}. Add those."
            )
        return {name: to_hex(palette[name]) for name in names}
    if not isinstance(palette, str):
        colours = list(map(to_hex, palette))[: len(names)]
    else:
        import seaborn  # takes long to load

        colours = list(seaborn.color_palette(palette, len(names)).as_hex())
    if len(set(colours)) < len(names):
        raise ValueError(
            f"`palette` should have a colour for each of {len(names)} names. Found "
            f"{len(set(colours))} in {palette!r}. Pass more, or a palette such as 'husl'."
        )
    return dict(zip(names, colours, strict=True))


def in_order(
    present: Sequence[str], hue_order: Sequence[str] | None, known: Collection[str] = ()
) -> list[str]:
    """The names that are drawn, in the order in which they are.

    >>> in_order(["a", "b", "c"], ["c", "a"])
    ['c', 'a']
    """
    if hue_order is None:
        return list(present)
    asked = [hue_order] if isinstance(hue_order, str) else list(dict.fromkeys(map(str, hue_order)))
    unknown = [name for name in asked if name not in {*present, *known}]
    kept = [name for name in asked if name in {*present}]
    if unknown or not (kept or known):
        raise ValueError(
            f"`hue_order` should have names of the table: {', '.join(present)}. Found "
            f"{', '.join(unknown) or 'none'}.{meant(unknown[0], present) if unknown else ''} "
            "Choose among those."
        )
    return kept


def colour_map(cmap: str | Colormap) -> Colormap:
    """A colour map by its name; grey where a value is undefined."""
    if isinstance(cmap, str):
        if cmap not in colormaps:
            import seaborn  # noqa: F401  # adds its own, such as "vlag"
        if cmap not in colormaps:
            raise ValueError(
                "`cmap` should be a colour map, or its name in matplotlib or seaborn. Found "
                f"{cmap!r}.{meant(cmap, list(colormaps))} Pass, say, cmap='PuOr'."
            )
        cmap = colormaps[cmap]
    return cmap.with_extremes(bad=UNDEFINED)


def finish(ax: Axes, xlim: Limits | None, ylim: Limits | None, title: str | None) -> Axes:
    """The axes, with the limits and the title that the caller asks for."""
    for name, limits, axis, put in (
        ("xlim", xlim, ax.xaxis, ax.set_xlim),
        ("ylim", ylim, ax.yaxis, ax.set_ylim),
    ):
        if limits is not None:
            put(*_ends(name, limits, above_zero=axis.get_scale() == "log"))
    if title is not None:
        heading(ax, title)
    return ax


def _ends(name: str, limits: Limits, *, above_zero: bool) -> Limits:
    ends = list(limits) if isinstance(limits, Iterable) else []
    said = [end for end in ends if end is not None]
    if (
        len(ends) != 2
        or not all(isinstance(end, Real) and isfinite(end) for end in said)
        or (above_zero and any(end <= 0 for end in said))
    ):
        what = "numbers above zero" if above_zero else "numbers"
        raise ValueError(
            f"`{name}` should be the two ends of the axis, {what} or None. Found {limits!r}. "
            f"Pass, say, {name}=(1, 100)."
        )
    return ends[0], ends[1]
