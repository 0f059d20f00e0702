"""Text of a picture: labels, headings and notes on lines that fit; what others wrote."""

from collections.abc import Iterable
from textwrap import wrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure

from geffect.numbers import percent
from geffect.text import plain

from .figures import height_of, width_of
from .style import medium, points
from .ticks import has_glyph, printed

ABREAST = 48  # characters of a heading on one line
LONGEST = 120  # characters of a label on several lines


def heading(ax: Axes, text: str) -> None:
    """What the panel shows, above its left edge."""
    room = min(ABREAST, int(72 * width_of(ax) / (0.55 * points("medium"))))
    ax.set_title(_on_lines(text, room), loc="left", fontsize=points("medium"))
    if beside := ax.get_title(loc="right"):
        note(ax, beside)


def level_headings(rows: Iterable[Iterable[Axes]]) -> None:
    """Puts the headings of a row of panels at one height, over the tallest note beside them."""
    for row in rows:
        said = {ax: ax.get_title(loc="left") for ax in row}
        lifted = max(len(text) - len(text.rstrip("\n")) for text in said.values())
        for ax, text in said.items():
            lines = text.rstrip("\n") + "\n" * lifted
            ax.set_title(lines, loc="left", fontsize=points("medium"))


def title(figure: Figure, text: str) -> None:
    """What the figure shows, above its panels."""
    room = min(LONGEST, int(72 * figure.get_figwidth() / (0.6 * points("large"))))
    figure.suptitle(_on_lines(text, room), fontsize=points("large"))


def note(ax: Axes, text: str) -> None:
    """How to read the panel, small, above its right edge."""
    left = ax.get_title(loc="left").rstrip("\n")
    room, small = 72 * width_of(ax), 0.56 * points("x-small")
    lines = _lines(text.replace("\n", " "), max(12, int(room / small))) or [""]
    beside = max(printed(line, points("medium")) for line in left.split("\n"))
    beside += max(printed(line, points("x-small")) for line in lines)
    lifted = len(lines) if left and beside + 6 > room else len(lines) - 1
    ax.set_title(left + "\n" * lifted, loc="left", fontsize=points("medium"))
    ax.set_title("\n".join(lines), loc="right", fontsize=points("x-small"), color="#555555")


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
    """The text on as few lines of a width as can be, about as long as each other.

    A G-effect is one word.

    >>> _lines("rate of conflict of objective and retain", 34)
    ['rate of conflict of', 'objective and retain']
    """
    lines = wrap(text, width, break_on_hyphens=False)
    longest_word = max(map(len, text.split()), default=1)
    narrower = (wrap(text, most, break_on_hyphens=False) for most in range(longest_word, width))
    return next((found for found in narrower if len(found) <= len(lines)), lines)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def longest(names: Iterable[str]) -> int:
    """The characters of the longest name as it is drawn."""
    return max(len(drawn(name)) for name in names)


def rate(table: pd.DataFrame) -> str:
    """In how many rows a value of 0 or 1 is 1, in words.

    >>> rate(pd.DataFrame({"value": [1.0, 0.0, 0.0, None]}))
    'rate 33 % of 3'
    """
    known = table["value"].dropna()
    return f"rate {percent(known.mean())} of {len(known)}" if len(known) else "undefined"


def wrapped(label: str, most: int = 34) -> str:
    """The label on lines short enough to stand beside a panel, the unit whole where that goes.

    >>> wrapped("retaining G-effect (nats per token per step)").splitlines()
    ['retaining G-effect', '(nats per token per step)']
    """
    if len(label) <= most:
        return drawn(label, most)
    words, bracket, unit = plain(label).partition(" (")
    lines = _lines(_short(words, LONGEST), most)
    of_unit = _lines(_short(bracket.strip() + unit, LONGEST), most)
    if lines and len(of_unit) == 1 and len(last := f"{lines[-1]} {of_unit[0]}") <= most:
        lines, of_unit = lines[:-1], [last]
    return "\n".join(drawn(line, most) for line in [*lines, *of_unit])


def axis_label(axis: Axis, text: str, longest: int = 34) -> None:
    """What an axis shows, on lines no longer than the axis is."""
    is_x = isinstance(axis, XAxis)
    length = width_of(axis.axes) if is_x else height_of(axis.axes)
    room = int(72 * length / (0.52 * points("medium")))
    if not is_x:
        room = min(longest, room) if medium() else longest
    axis.set_label_text(wrapped(text, max(12, room)), fontsize=points("medium"))
