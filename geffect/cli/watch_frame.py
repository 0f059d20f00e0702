"""What a terminal shows of a run that is followed: a frame, or a line for each new step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from geffect.numbers import percent
from geffect.text import plain

from .terminal import tall
from .watch_courses import Course, bucketed
from .watch_view import State, View

Floats = NDArray[np.float64]

COLOURS = {"unlearning": "#b3261e", "retaining": "#4a90d9"}
"""Those that the two effects have in pictures."""

KEY = "Bars share a scale by column, negative to the left; each curve has its own."

LEAST_BAR, MOST_BAR, LEAST_CURVE, MOST_CURVE = 7, 31, 8, 40
NUMBER = 10
"""The cells of a number."""

ABREAST = 40
"""The columns of a terminal from which on two effects stand beside each other."""


@dataclass(frozen=True)
class Marks:
    """The characters that draw."""

    levels: str
    full: str
    half: tuple[str, str]  # that reaches to the left, and to the right
    zero: str
    rest: str


BLOCKS = Marks("▁▂▃▄▅▆▇█", "█", ("▐", "▌"), "│", "░")
LETTERS = Marks("_.-=+*#@", "#", ("-", "-"), "|", ".")


def marks_of(console: Console) -> Marks:
    """Those that the terminal can write."""
    try:
        (BLOCKS.levels + BLOCKS.zero + BLOCKS.rest).encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return LETTERS
    return BLOCKS


def frame(view: View, marks: Marks, width: int, height: int | None = None) -> Group:
    """All there is to say, in so many columns; in so many lines, if the height is given."""
    head: list[RenderableType] = [_title(view, width), *_done(view, marks, width)]
    foot: list[RenderableType] = [Text(plain(note)) for note in view.notes]
    if not view.steps:
        return Group(*head, *foot)
    foot = [Text(), _numbers(view, marks, width), _pace(view), *foot]
    if not view.effects:
        return Group(*head, *foot)
    head += [Text(), _dim(f"{view.effects[0].says}, step {view.steps[-1]}")]
    count, widths = len(view.effects[0].blocks), _widths(view, width)
    if widths.bar:
        foot.insert(0, _dim(KEY))
    shown = [*range(count)]
    if height is not None:
        room = height - tall(Group(*head, *foot), width) - 2
        lines = max(-(-cell_len(plain(block)) // widths.name) for block in view.effects[0].blocks)
        shown = _spread(count, max(3, room // lines // len(_abreast(view, width))))
    tables = [_by_block(view, effects, shown, marks, widths) for effects in _abreast(view, width)]
    if len(shown) < count:
        foot.insert(0, _dim(f"{len(shown)} of {count} rows; --by group has fewer."))
    return Group(*head, *tables, *foot)


def lines_of(view: View) -> Iterator[str]:
    """A line for each step."""
    for i in range(len(view.steps)):
        told = [f"step {view.steps[i]}"]
        told += [f"{c.name} {number(c.values[i, 0])}" for c in view.totals]
        told += [f"{c.name} {known_rate(c.rates[i])}" for c in view.rates]
        told += [f"loss {c.name} {number(c.values[i, 0])}" for c in view.losses]
        yield "  ".join(told)


def number(value: float) -> str:
    """A number in few cells.

    >>> number(-1234.5), number(0.0), number(float("nan"))
    ('-1234', '0', 'unknown')
    """
    return f"{value:.4g}" if value == value else "unknown"


def known_rate(rate: float) -> str:
    """A rate in per cent, where it is known."""
    return percent(rate) if rate == rate else "unknown"


def curve(values: Floats, width: int, marks: Marks, bounds: tuple[float, ...] = ()) -> str:
    """The values over the steps as characters of a height, from the lowest to the highest.

    Several steps that share a cell are their mean; a cell without a value is empty. `bounds` are
    the ends of the scale in the place of the lowest and the highest value.

    >>> curve(np.array([0.0, 1.0, float("nan"), 7.0]), 8, BLOCKS)
    '▁▂ █'
    """
    shown = bucketed(values, width)
    finite = shown[np.isfinite(shown)]
    if not finite.size:
        return ""
    low, high = bounds or (finite.min(), finite.max())
    # Halves first: the distance of two large numbers may be too large for one.
    share = (shown / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.full_like(shown, 0.5)
    known, top = np.isfinite(shown), len(marks.levels) - 1
    return "".join(
        marks.levels[round(float(s) * top)] if there else " "
        for s, there in zip(share, known, strict=True)
    )


def bar(value: float, most: float, width: int, marks: Marks) -> str:
    """A bar from a line in the middle, to the left where the value is negative.

    >>> bar(-1.0, 2.0, 9, BLOCKS), bar(2.0, 2.0, 9, BLOCKS)
    ('  ██│    ', '    │████')
    """
    side = (width - 1) // 2
    halves = round(2 * side * min(1.0, abs(value) / most)) if most > 0 and value == value else 0
    if halves == 0 and value == value and value != 0.0:
        halves = 1  # a sign is there to be seen
    left, right = marks.half
    if value < 0:
        drawn = left * (halves % 2) + marks.full * (halves // 2)
        return drawn.rjust(side) + marks.zero + " " * side
    drawn = marks.full * (halves // 2) + right * (halves % 2)
    return " " * side + marks.zero + drawn.ljust(side)


def _title(view: View, width: int) -> Text:
    """The file and how it stands, below each other where both have no room on a line."""
    colour = {State.WAITING: "dim", State.OPEN: "green", State.COMPLETE: "cyan"}[view.state]
    path = Text(plain(view.path), style="bold")
    stands = Text(view.stands, style="yellow" if view.is_quiet else colour)
    stands.append(f"  {view.captured}" if view.captured else "", style="none")
    fits = cell_len(path.plain) + 2 + cell_len(stands.plain) <= width
    return Text.assemble(path, "  " if fits else "\n", stands)


def _dim(text: str) -> Text:
    return Text(plain(text), style="dim")


def _done(view: View, marks: Marks, width: int) -> list[Text]:
    """A bar of what is done of the plan, and what comes next, if anything does."""
    lines = [] if view.state is State.COMPLETE else [Text(plain(view.comes))]
    if view.planned and view.steps and width >= 20:
        room = min(width - 8, 60)
        share = min(1.0, len(view.steps) / view.planned)
        drawn = (marks.full * round(share * room)).ljust(room, marks.rest)
        lines.insert(0, Text(f"{drawn} {percent(share)}"))
    return lines


def _abreast(view: View, width: int) -> list[tuple[Course, ...]]:
    """The two effects that have a number for each block: beside each other where there is room."""
    effects = view.effects[:2]
    return [effects] if width >= ABREAST else [(effect,) for effect in effects]


@dataclass(frozen=True)
class _Widths:
    """The cells of a name, a bar and a curve; 0 where there is no room for any."""

    name: int
    bar: int
    curve: int


def _widths(view: View, width: int) -> _Widths:
    effects = _abreast(view, width)[0]
    longest = max(map(cell_len, (view.by, *map(plain, effects[0].blocks))))
    name = min(longest, max(cell_len(view.by), width // 3))
    each = (width - name) // len(effects) - NUMBER - 3
    wide = each >= LEAST_BAR + LEAST_CURVE + 1
    curve = min(max(LEAST_CURVE, each // 2), MOST_CURVE) if wide else 0
    bar = min(each - curve - (1 if wide else 0), MOST_BAR)
    return _Widths(name, 0 if bar < LEAST_BAR else bar - (bar % 2 == 0), curve)


def _by_block(
    view: View, effects: Sequence[Course], shown: Sequence[int], marks: Marks, widths: _Widths
) -> Table:
    """The table of blocks: of each effect the last value, a bar, and the curve."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(Text(view.by), width=widths.name, overflow="fold")
    for effect in effects:
        style = COLOURS.get(effect.name, "")
        heading = Text(plain(effect.name), style)
        table.add_column(heading, justify="right", min_width=NUMBER, no_wrap=True)
        for wide in filter(None, (widths.bar, widths.curve)):
            table.add_column("", style=style, width=wide, no_wrap=True, overflow="crop")
    most = [_most(effect.last) for effect in effects]
    for i in shown:
        cells = [plain(effects[0].blocks[i])]
        for effect, largest in zip(effects, most, strict=True):
            cells.append(number(effect.last[i]))
            if widths.bar:
                cells.append(bar(effect.last[i], largest, widths.bar, marks))
            if widths.curve:
                cells.append(curve(effect.values[:, i], widths.curve, marks))
        table.add_row(*map(Text, cells))
    return table


def _numbers(view: View, marks: Marks, width: int) -> Table:
    """A row for each number of the whole model, with its curve."""
    rows: list[tuple[str, str, str, str]] = []
    room = min(MOST_CURVE, width - 2 * NUMBER - LEAST_CURVE)

    def drawn(values: Floats, *bounds: float) -> str:
        return curve(values, room, marks, bounds) if room >= LEAST_CURVE else ""

    own = view.effects[0].unit if view.effects else ""
    for course in view.totals:
        colour = COLOURS.get(course.name.partition(",")[0], "")
        values = course.values[:, 0]
        unit = "" if course.unit == own else f" ({course.unit})"
        rows.append((f"{course.name}{unit}", number(values[-1]), drawn(values), colour))
    for course in view.rates:
        told = f"{course.name} rate (last step {known_rate(course.rates[-1])})"
        rows.append((told, known_rate(course.rate), drawn(course.rates, 0.0, 1.0), ""))
    for course in view.losses:
        values = course.values[:, 0]
        rows.append((f"loss {course.name}", number(values[-1]), drawn(values), ""))
    table = Table(
        box=None, pad_edge=False, padding=(0, 1), collapse_padding=True, show_header=False
    )
    table.add_column("", overflow="fold")
    table.add_column("", justify="right", min_width=min(NUMBER, width // 3), no_wrap=True)
    if room >= LEAST_CURVE:
        table.add_column("", min_width=min(room, len(view.steps)), no_wrap=True)
    for says, value, shown, colour in rows:
        table.add_row(
            *map(Text, (plain(says), value)),
            *([Text(shown, colour)] if room >= LEAST_CURVE else []),
        )
    return table


def _pace(view: View) -> Text:
    if view.step_seconds != view.step_seconds:
        return Text()
    pace = f"{number(view.steps_per_second)} steps per second"
    return Text(f"{pace}, {number(view.step_seconds)} s a captured step")


def _most(values: Floats) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0))


def _spread(count: int, room: int) -> list[int]:
    """Up to so many places, the first and the last among them."""
    if count <= room:
        return list(range(count))
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, room)})
