"""The tokens of a sample as running text, each on the colour of its effect."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from unicodedata import east_asian_width

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, ScaledTranslation, Transform

from geffect.scores import score_of
from geffect.text import plain

from .conventions import Asked, picture
from .figures import new_axes
from .fit import constants, levels, names_in, once_only, require
from .frames import Frame, colours_of
from .style import LEAST, medium
from .style import points as size_of
from .ticks import Decades
from .words import drawn, heading

FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]
# Of a character and a line of the first font, in font sizes. A character is 0.602 wide; on screens
# it is rounded up to whole pixels.
ADVANCE, LEADING = 0.64, 1.7
SHRUNK = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the text of other pictures, as it has room
WIDTH = 84  # characters in a line of a figure of one's own
BREAK = "↵"
# What would move the text, as itself.
SHOWN = str.maketrans({"\n": BREAK, "\r": BREAK, "\t": "→"})


@dataclass(frozen=True)
class Placed:
    """A token, or a part of a long one, in cells from the upper left."""

    token: int
    line: int
    column: int
    text: str


@picture(Text, by="cmap")
def text(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """The answer of one sample, every token on the colour of its value, white where that is zero.

    - `table`: `position`, `token` and `value` of one sample, as `geffect.analysis.tokens` gives
      them.
    - `ax`, `cmap`, `xlim`, `ylim`, `title`, keywords of a text: see
      `geffect.plots.conventions`.

    Returns the axes. Raises ValueError for a table of several
    samples or risks.

    Lines break between words, and after the line breaks of the text, which are shown. The scale is
    symmetric about zero.

    >>> table = pd.DataFrame({"sample": 3, "position": [7, 8], "token": [" red", " fox"],
    ...                       "p": [0.9, 0.2], "value": [-2.0, 0.5]})
    >>> ax = text(table)
    >>> ax.get_title(loc="left"), [drawn.get_text() for drawn in ax.texts]
    ('sample 3', [' red', ' fox'])
    """
    name, table = answer(table)
    tokens = [_shown(token) for token in table["token"]]
    if ax is None:
        advance = ADVANCE * _sizes()[0] / 72
        made_for = medium()
        columns = int((made_for.width - 0.2) / advance) if made_for else WIDTH
        tall = lines(tokens, columns) * LEADING * _sizes()[0] / 72
        ax = new_axes(columns * advance + 0.2, tall + 0.09 * size_of("medium"))
    ax.set_axis_off()
    heading(ax, name)
    colours = _scale(ax, table, asked)
    values = np.ma.masked_invalid(table["value"].to_numpy(dtype=float))
    backgrounds = colours.to_rgba(values)
    size, columns = _room(ax, tokens)
    points = _from_upper_left(ax)
    for placed in flow(tokens, columns):
        background = backgrounds[placed.token]
        x, y = placed.column * ADVANCE * size, -(placed.line + 1) * LEADING * size
        cell = Rectangle(
            (x, y), cells(placed.text) * ADVANCE * size, 0.94 * LEADING * size,
            transform=points, facecolor=background, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        written = ax.text(
            x, y + 0.55 * size, placed.text,
            **asked.look(transform=points, fontsize=size, fontfamily=FONTS,
                         color=readable_on(background), parse_math=False),
        )  # fmt: skip
        for artist in (ax.add_artist(cell), written):
            # They follow a layout that is settled, and would otherwise be part of the next one.
            artist.set_in_layout(False)
            artist.set_clip_on(False)
    return ax


def answer(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The name of one text, and its tokens in order. Raises ValueError for several texts.

    >>> table = pd.DataFrame({"sample": 3, "position": [8, 7], "token": ["b", "a"], "value": 0.0})
    >>> name, tokens = answer(table)
    >>> name, list(tokens["token"])
    ('sample 3', ['a', 'b'])
    """
    require(table, ["sample", "position", "token", "value"])
    sample = _single_sample(table)
    once_only(table, ["position"])
    table = table.sort_values("position")
    return ", ".join(name for name in (f"sample {sample}", _names(table)) if name), table


def flow(tokens: Sequence[str], columns: int) -> Iterator[Placed]:
    """Where each token goes in lines of `columns` cells: a word that fits into one stays whole.

    >>> [(placed.line, placed.text) for placed in flow(["a", " long", "er", " tail"], 8)]
    [(0, 'a'), (0, ' long'), (0, 'er'), (1, ' tail')]
    """
    line = column = 0
    starts = [i for i, token in enumerate(tokens) if i == 0 or token[0].isspace()]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        for index in range(start, end):
            rest = cells("".join(tokens[start:end])) if index == start else cells(tokens[index])
            if column and column + rest > columns:
                line, column = line + 1, 0
            for part in _parts(tokens[index], columns):
                if column and column + cells(part) > columns:
                    line, column = line + 1, 0
                yield Placed(index, line, column, part)
                column += cells(part)
            if BREAK in tokens[index]:
                line, column = line + 1, 0


def lines(tokens: Sequence[str], columns: int) -> int:
    """How many lines the tokens take.

    >>> lines(["a", " long", "er", " tail"], 8)
    2
    """
    return 1 + max(placed.line for placed in flow(tokens, columns))


def cells(token: str) -> int:
    """How many cells a token takes: an ideograph takes two.

    >>> cells(" a語")
    4
    """
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in token)


def _parts(token: str, columns: int) -> list[str]:
    """The token, cut where it is longer than a line."""
    indices = [0, *accumulate(cells(character) for character in token)]
    parts, start = [], 0
    for end in range(1, len(token) + 1):
        if end == len(token) or indices[end + 1] - indices[start] > columns:
            parts.append(token[start:end])
            start = end
    return parts


def _shown(token: object) -> str:
    if not isinstance(token, str):
        return f" {token}"  # an id
    return plain(token.translate(SHOWN)) or "∅"


def _single_sample(table: pd.DataFrame) -> str:
    several = {name: those for name, those in _told_apart(table).items() if len(those) > 1}
    if several:
        column, names = next(iter(several.items()))
        raise ValueError(
            f"`table` should hold one {column}, to be one text. Found {len(names)}: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. "
            f"Choose with table[table[{column!r}] == {table[column].iloc[0]!r}]."
        )
    return str(table["sample"].iloc[0])


def _told_apart(table: pd.DataFrame) -> dict[str, list[str]]:
    others = {name: those for name, those in names_in(table).items() if name != "token"}
    return {"sample": levels(table["sample"]), **others}


def _names(table: pd.DataFrame) -> str:
    return constants(table.drop(columns=["sample", "token"]))


def _scale(ax: Axes, table: pd.DataFrame, asked: Asked) -> ScalarMappable:
    """The colours of the values, and a bar of them below the text."""
    as_model = table.assign(model="model")
    score, frame = score_of(table), Frame.of(as_model)
    cmap, norm = colours_of(as_model)
    colours = ScalarMappable(norm, asked.colours(cmap))
    bar = ax.figure.colorbar(
        colours, ax=ax, location="bottom", shrink=0.5, aspect=45, pad=0.02, anchor=(0.0, 1.0)
    )
    undefined = " (grey: undefined)" if table["value"].isna().any() else ""
    bar.ax.set_xlabel(drawn(score.full, 120) + undefined, fontsize=size_of("small"), loc="left")
    if score.scale == "symlog":
        Decades.put(bar.ax.xaxis, frame.threshold, size_of("x-small"))
    bar.ax.minorticks_off()
    bar.ax.tick_params(width=0.6, length=2.5, labelsize=size_of("x-small"))
    bar.outline.set_visible(False)
    return colours


def _room(ax: Axes, tokens: Sequence[str]) -> tuple[float, int]:
    """The largest font size at which the text fits into the axes, and the cells of a line."""
    figure = ax.figure.canvas.figure
    figure.draw_without_rendering()  # the layout decides how wide the axes are
    inside = ax.get_window_extent()
    wide, tall = (side * 72 / figure.dpi for side in (inside.width, inside.height))
    for size in _sizes():
        columns = max(2, int(wide / (ADVANCE * size)))
        if lines(tokens, columns) * LEADING * size <= tall:
            break
    return size, columns


def _sizes() -> list[float]:
    """The sizes of the text, of which the first is what it should have."""
    first, *smaller = (share * size_of("medium") for share in SHRUNK)
    return [max(first, LEAST), *smaller]


def _from_upper_left(ax: Axes) -> Transform:
    """Points to the right of, and above, the upper left corner of the axes."""
    corner = ScaledTranslation(0.0, 1.0, ax.transAxes)  # type: ignore[arg-type]
    return Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans + corner


def readable_on(background: Sequence[float]) -> str:
    """Dark or white, whichever can be read on a colour."""
    red, green, blue = background[:3]
    return "#1a1a1a" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
