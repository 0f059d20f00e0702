"""What the command line prints: the one way to a terminal, and tables that cut nothing."""

import io
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from geffect.numbers import as_json
from geffect.text import lines, plain

from .options import Format

if TYPE_CHECKING:
    import pandas as pd

EVERYTHING = 1_000_000
"""The columns of what is no terminal, such as a file: nothing is folded."""

FOLDED = 8
"""The cells that a name is folded to, at least, where a terminal is narrow."""

WHOLE = 16
"""The cells up to which words of names stay whole, where spare columns leave room for them."""


NARROWEST = 22
"""The columns of what is drawn in columns, at least: fewer would cut numbers."""


class _Terminal(Console):
    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        if not self.width:  # as by COLUMNS=0, where nothing at all would be printed
            self.width = shutil.get_terminal_size().columns

    def on_broken_pipe(self) -> None:
        """Leave it to the caller of the command, also where nothing of rich has printed."""
        raise BrokenPipeError


def terminal(*, stderr: bool = False) -> Console:
    """The terminal, to which text is text: no markup, no codes of emoji, no marks of its own."""
    stream = sys.stderr if stderr else sys.stdout
    return _Terminal(
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
        width=None if stream.isatty() else EVERYTHING,
    )


def canvas(width: int) -> Console:
    """The terminal, or in its place a file of so many columns, for what is drawn in columns."""
    console = _Terminal(
        markup=False,
        emoji=False,
        highlight=False,
        width=None if sys.stdout.isatty() else width,
    )
    console.width = max(NARROWEST, console.width)
    return console


def draw(console: Console, drawn: RenderableType) -> None:
    """Print what is drawn in columns, whose text is `plain` already."""
    console.print(drawn)


def picture(drawn: RenderableType, width: int, title: str) -> str:
    """What a terminal of so many columns shows, as SVG that asks nobody for a font."""
    console = _Terminal(file=io.StringIO(), width=width, record=True, force_terminal=True)
    console.print(drawn)
    svg = console.export_svg(title=title, unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def tall(drawn: RenderableType, width: int) -> int:
    """How many lines something takes in so many columns."""
    return len(_Terminal(file=io.StringIO(), width=width).render_lines(drawn))


def say(console: Console, *said: object, hang: int = 0) -> None:
    """Print lines of text, which may hold what others wrote.

    A terminal gets them folded between words, and from the second on behind `hang` cells; a word is
    never cut, as a path is copied from there.
    """
    for line in said:
        first, *others = _folded(plain(line), console.width)
        rest = _folded(" ".join(others), console.width - hang) if others else []
        console.print(Text("\n".join([first, *(" " * hang + part for part in rest)])))


def say_marked(console: Console, mark: str, colour: str, text: object) -> None:
    """Print a text behind a word in colour, folded by a terminal below its own beginning."""
    hang = cell_len(mark) + 3
    folded = f"\n{' ' * hang}".join(_folded(plain(text), console.width - hang))
    console.print(Text.assemble("  ", (mark, colour), " ", folded))


def showing_rows(console: Console) -> Callable[[str, str], None]:
    """What shows the first row of a data set as the model reads it."""

    def show_row(name: str, text: str) -> None:
        say(console, f"First row of {name}, scored between [[ and ]]:", *text.split("\n"))

    return show_row


def write(data: str) -> None:
    """Write data to the standard output as it is; what a terminal would obey is shown to it."""
    sys.stdout.write(lines(data) if sys.stdout.isatty() else data)


def write_json(facts: object, indent: int | None = None) -> None:
    """Write facts as data."""
    write(as_json(facts, indent) + "\n")


def write_table(table: "pd.DataFrame", form: Format) -> None:
    """Write a table as data: every row, and every digit of its numbers."""
    if form is Format.JSON:
        # Not pandas' own JSON, which rounds to ten decimals: early scores are smaller than that.
        write_json(table.to_dict("records"))
    elif form is Format.CSV:
        write(table.to_csv(index=False))
    else:
        # No quotes: a tab or a line break inside of a name is written as its code.
        kept = table.astype(object).where(table.notna(), "")
        written: list[list[object]] = [[*kept.columns], *kept.to_numpy().tolist()]
        for line in written:
            write("\t".join(map(plain, line)) + "\n")


def show(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: Collection[str],
    spare: Sequence[str] = (),
    whole: object = "--format tsv",
) -> None:
    """Print a table in which no number and no name is cut.

    - `names`: the headings of columns that hold names, on the left; others hold numbers.
    - `spare`: the headings of columns that may go, the first one first.
    - `whole`: what has them all the same: an option of the command, or a file.

    Where a terminal is narrow, names are folded between words, and spare columns are left out,
    which is said. Where that is not enough, words are folded too. Where that is not enough either,
    each row is a list of all columns, a line a column.
    """
    cells = {
        heading: [plain(cell) for cell in column]
        for heading, column in zip(headings, zip(*rows, strict=True), strict=True)
    } or {heading: [] for heading in headings}
    widths = {heading: max(map(cell_len, (heading, *column))) for heading, column in cells.items()}
    for most in (WHOLE, FOLDED):
        least = {
            heading: min(wide, _whole([heading, *cells[heading]], most))
            if heading in names
            else wide
            for heading, wide in widths.items()
        }
        left_out = []
        for heading in spare:
            if _room(least) <= console.width:
                break
            least.pop(heading)
            left_out.append(heading)
        if _room(least) <= console.width:
            break
    else:
        _show_lists(console, headings, rows)
        return
    shown = _widened(least, widths, console.width)
    table = Table()
    for heading, width in shown.items():
        is_name = heading in names
        justify: Literal["left", "right"] = "left" if is_name else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold", width=width)
    for row in zip(*(cells[heading] for heading in shown), strict=True):
        table.add_row(*map(Text, row))
    # Not the terminal itself, which leaves lines to be folded by whoever shows them.
    _Terminal(file=console.file, width=_room(shown), emoji=False, markup=False).print(table)
    if left_out:
        say(
            console,
            f"Left out for want of room: {', '.join(left_out)}. A wider terminal shows "
            f"{'it' if len(left_out) == 1 else 'them'}, and so does {whole}.",
        )


def _show_lists(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as a list: a line a column, behind its heading."""
    hang = max(map(cell_len, headings)) + 2
    for index, row in enumerate(rows):
        say(console, *[""] * (index > 0))
        for heading, cell in zip(headings, row, strict=True):
            say(console, heading + " " * (hang - cell_len(heading)) + cell, hang=hang)


def _folded(line: str, width: int) -> list[str]:
    """The line in lines of a width in cells; a longer word has one for itself, 9 % is one."""
    lines = [""]
    for word in re.findall(r"\s*\S+(?:(?<=\d) %\S*)?", line):
        if lines[-1].strip() and cell_len(lines[-1] + word) > width:
            lines.append(word.lstrip())
        else:
            lines[-1] += word
    return lines


def _room(widths: Mapping[str, int]) -> int:
    """The cells of a table with columns of these widths, and its lines."""
    return sum(widths.values()) + 3 * len(widths) + 1


def _widened(least: Mapping[str, int], wanted: Mapping[str, int], room: int) -> dict[str, int]:
    """The widths of the columns, with the room that is left: first those that want little more."""
    widths = dict(least)
    for heading in sorted(widths, key=lambda heading: wanted[heading] - least[heading]):
        more = min(wanted[heading] - widths[heading], room - _room(widths))
        widths[heading] += max(0, more)
    return widths


def _whole(cells: Sequence[str], most: int) -> int:
    """The cells in which words of the heading, and those up to so many cells, are not folded."""
    heading, *others = cells
    words = [cell_len(word) for cell in others for word in cell.split()]
    return max(FOLDED, _word(heading), *(wide for wide in words if wide <= most))


def _word(heading: str) -> int:
    """The cells of the longest word of a heading."""
    return max(map(cell_len, heading.split()), default=0)
