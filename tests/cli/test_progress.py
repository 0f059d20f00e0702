"""How far a study is, in a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from geffect.cli.progress import shown
from geffect.demo.workers import Progress

NEWS = [
    Progress("original-seed0", "train", 4.0, 0.5, "step 200 of 400"),
    Progress("original-seed0", "train", 4.0, 1.0, "done"),
    Progress("ga-plain-seed0", "unlearn", 1.0, 0.5, "step 9, forget NLL 1.20"),
]


def shown_of(news: list[Progress], *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    with shown(5.0, console) as take:
        for item in news:
            take(item)
    return stream.getvalue()


def test_a_terminal_has_a_bar_for_the_study_and_for_each_job_that_runs() -> None:
    last = shown_of(NEWS, terminal=True).split("study")[-1]
    assert "90 %" in last
    assert "unlearn" in last
    assert "ga-plain-seed0" in last and "forget NLL 1.20" in last
    assert "original-seed0" not in last, "a job that is done has no bar"


def test_elsewhere_a_line_says_what_a_job_came_to_and_what_is_left() -> None:
    (line,) = shown_of(NEWS, terminal=False).splitlines()
    assert "80 %" in line and "original-seed0: step 200 of 400" in line and "left" in line


@pytest.mark.parametrize("terminal", [True, False])
def test_a_job_that_falls_back_takes_nothing_from_the_study(terminal: bool) -> None:
    back = [NEWS[0], Progress("original-seed0", "train", 4.0, 0.1, "again"), NEWS[1]]
    assert "80 %" in shown_of(back, terminal=terminal)
