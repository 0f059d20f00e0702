"""Frames of a run that is followed, in every width and height: what they say is there whole."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from geffect.cli import watch_picture
from geffect.cli.watch_courses import Course
from geffect.cli.watch_frame import (
    BLOCKS,
    KEY,
    LETTERS,
    bar,
    curve,
    frame,
    lines_of,
    marks_of,
    number,
)
from geffect.cli.watch_view import State, View

LONG = "model.layers.10.self_attn.q_proj.weight"


def view_of(blocks: int = 6, steps: int = 40, **further: object) -> View:
    rng = np.random.default_rng(0)
    names = tuple(f"layer {i}" for i in range(blocks))

    def course(name: str, columns: tuple[str, ...], unit: str = "nats") -> Course:
        scales = 10.0 ** rng.integers(-6, 7, len(columns))
        values = rng.normal(size=(steps, len(columns))) * scales
        return Course(name, columns, values, f"G-effect ({unit})", unit)

    conflicts = rng.integers(2, size=(steps, blocks)).astype(float)
    told = {
        "planned": 50,
        "next_step": 3 * steps,
        "is_told": True,
        "age": 3.0,
        "notes": ("No violations: none was recorded.",),
        **further,
    }
    return View(
        Path("a run.h5"),
        State.OPEN,
        "layer",
        tuple(range(0, 3 * steps, 3)),
        (course("unlearning", names), course("retaining", names)),
        (
            course("unlearning, rectified", ("model",)),
            course("retaining, update", ("model",), "tokens"),
        ),
        (Course("conflict", names, conflicts, "conflict of a and b"),),
        (course("forget", ("loss",)),),
        np.arange(steps) / 2.0,
        **told,  # type: ignore[arg-type]
    )


def drawn(view: View, width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(frame(view, BLOCKS, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [22, 30, 39, 40, 52, 64, 80, 100, 160, 300])
def test_a_frame_fits_its_width_and_cuts_no_number(width: int) -> None:
    view = view_of()
    lines = drawn(view, width)
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    for effect in view.effects:
        assert {number(value) for value in effect.last} <= {*words}
    for course in (*view.totals, *view.losses):
        assert number(course.last[0]) in words
    for said in ("next: step 120; written 3 s ago", "6 steps per second, 0.5 s a captured step"):
        assert said in " ".join(words)
    assert "…" not in "".join(lines)


def test_a_wide_frame_has_bars_and_curves_and_a_narrow_one_numbers() -> None:
    wide, narrow = ["\n".join(drawn(view_of(), width)) for width in (120, 22)]
    assert "│" in wide and "Bars share" in wide and "▁" in wide
    assert "│" not in narrow and "Bars share" not in narrow


@pytest.mark.parametrize("height", [24, 30, 50, 200])
@pytest.mark.parametrize("width", [60, 100])
def test_a_frame_fits_its_height_with_the_first_and_the_last_block(width: int, height: int) -> None:
    lines = drawn(view_of(blocks=80), width, height)
    assert len(lines) <= height
    text = "\n".join(lines)
    assert "layer 0 " in text and "layer 79 " in text
    assert ("of 80 rows" in text) == (height < 100)


@pytest.mark.parametrize("width", [1, 2, 5, 9, 13, 20])
@pytest.mark.parametrize("height", [None, 0, 1, 7])
def test_a_terminal_may_be_too_small_for_anything(width: int, height: int | None) -> None:
    assert drawn(view_of(), width, height)


def test_names_of_tensors_are_whole_however_narrow_it_is() -> None:
    view = view_of(blocks=2)
    names = (LONG, LONG.replace("10", "11"))
    effects = tuple(Course(e.name, names, e.values, e.says, e.unit) for e in view.effects)
    for width in (24, 50, 80):
        lines = drawn(View(**{**vars(view), "effects": effects, "by": "parameter"}), width)
        assert max(map(cell_len, lines)) <= width
        start = next(i for i, line in enumerate(lines) if line.startswith("parameter"))
        room = next(w for w in range(1, width) if lines[start + 1][w] == " ")
        together = "".join(line[:room].strip() for line in lines[start + 1 :])
        assert all(name in together for name in names)


def test_what_others_wrote_is_text() -> None:
    view = view_of(blocks=2)
    names = ("[red]a[/red]", "b\x1b[2J\n")
    effects = tuple(Course(e.name, names, e.values, e.says, e.unit) for e in view.effects)
    odd = {"effects": effects, "notes": ("c\x1b]0;d",), "path": Path("e\x1b[31m")}
    text = "\n".join(drawn(View(**{**vars(view), **odd}), 200))
    for said in ("[red]a[/red]", "b\\x1b[2J\\n", "c\\x1b]0;d", "e\\x1b[31m"):
        assert said in text
    assert "\x1b" not in text


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps(steps: int) -> None:
    text = "\n".join(drawn(view_of(steps=steps), 100))
    assert ("steps per second" in text) == (steps > 1)
    assert f"{steps} captured" in text


def test_a_run_that_is_complete_says_so_once() -> None:
    view = view_of(steps=6)
    done = View(**{**vars(view), "state": State.COMPLETE, "planned": 8})
    text = "\n".join(drawn(done, 80))
    assert text.count("complete") == 1 and "complete: 6 steps of 8 planned" in text
    assert "6 captured" not in text and "written" not in text


def test_the_key_of_bars_fits_in_a_line_of_eighty() -> None:
    (line,) = (line for line in drawn(view_of(), 80) if line.startswith("Bars"))
    assert line.strip() == KEY


def test_a_run_that_has_not_begun_says_that_it_waits() -> None:
    lines = drawn(View(Path("run.h5"), State.WAITING, age=7.0), 80)
    assert lines == ["run.h5  waiting", "waiting for its first step, for 7 s"]


def test_values_that_are_not_known_are_said_to_be_unknown() -> None:
    view = view_of(blocks=2)
    for effect in view.effects:
        effect.values[-1, 0] = np.nan
        effect.values[3, 1] = np.inf
    view.rates[0].values[:] = np.nan
    text = "\n".join(drawn(view, 120))
    assert text.count("unknown") == 4


def test_a_line_a_step_holds_its_numbers() -> None:
    view = view_of(steps=3)
    lines = [*lines_of(view)]
    assert [line.split("  ")[0] for line in lines] == ["step 0", "step 3", "step 6"]
    for i, line in enumerate(lines):
        for course in (*view.totals, *view.losses):
            assert f"{course.name} {number(course.values[i, 0])}" in line
        assert f"conflict {100 * view.rates[0].values[i].mean():.0f} %" in line


def test_the_picture_of_a_frame_asks_nobody_for_anything(recorded: Path) -> None:
    svg = watch_picture.drawn(recorded)
    assert svg.startswith("<svg") and "url(http" not in svg and "@font-face" not in svg
    assert "unlearning" in svg and "complete:\u00a04\u00a0steps" in svg.replace("&#160;", "\u00a0")


# Bars and curves.


@pytest.mark.parametrize("value", [-8.0, -3.1, -0.01, 0.0, 1e-9, 2.0, 7.9, 8.0, 99.0])
@pytest.mark.parametrize("width", [7, 9, 21])
def test_a_bar_is_as_long_as_its_value_and_on_its_side(value: float, width: int) -> None:
    drawn = bar(value, 8.0, width, BLOCKS)
    left, zero, right = drawn.partition("│")
    assert zero and len(drawn) == width and len(left) == len(right) == width // 2
    own, other = (left, right) if value < 0 else (right, left)
    assert not other.strip()
    long = own.count("█") + 0.5 * (own.count("▌") + own.count("▐"))
    assert abs(long - min(1.0, abs(value) / 8.0) * (width // 2)) <= 0.5
    assert (long > 0) == (value != 0.0), "a sign is seen"


@pytest.mark.parametrize("most", [0.0, 5e-324, 1e308])
def test_bars_of_extreme_numbers(most: float) -> None:
    for value in (most, -most, float("nan")):
        assert cell_len(bar(value, most, 9, BLOCKS)) == 9


def test_a_curve_goes_from_its_lowest_to_its_highest_value() -> None:
    values = np.array([3.0, -1.0, 0.0, np.nan, 1.0, 3.0])
    assert curve(values, 10, BLOCKS) == "█▁▃ ▅█"
    assert curve(values, 10, LETTERS) == "@_- +@"
    assert curve(np.full(3, 2.0), 10, BLOCKS) == "▅▅▅"
    assert curve(np.full(3, np.nan), 10, BLOCKS) == ""
    assert curve(np.array([0.0, 1.0]), 10, BLOCKS, (0.0, 1.0)) == "▁█"
    assert curve(np.zeros(3), 10, BLOCKS, (0.0, 1.0)) == "▁▁▁"
    assert len(curve(np.random.default_rng(0).normal(size=1000), 17, BLOCKS)) == 17
    assert curve(np.array([-1.7e308, 1.7e308]), 4, BLOCKS) == "▁█"


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", BLOCKS), ("ascii", LETTERS)])
def test_marks_are_those_that_a_terminal_can_write(encoding: str, marks: object) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert marks_of(Console(file=stream)) is marks
