"""What is said of a run while it is written: always what its file says, however it comes about."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect import open_run
from geffect.analysis import conflict, cosine, g_effect, violation
from geffect.cli.followed import Followed
from geffect.cli.watch_courses import Course, bucketed
from geffect.cli.watch_planned import Planned
from geffect.cli.watch_view import State, View
from geffect.store import Contents, Row, RunFileError, rows
from geffect.store.writer import RunWriter
from tests.utils.runs import MANIFEST, PARAMETERS, SOURCES, append, plain_rows, recorded


def gram(step: int, seed: int = 0) -> np.ndarray:
    """Of gradients that point anywhere, in conflict or not."""
    G = np.random.default_rng([seed, step]).normal(size=(len(PARAMETERS), len(SOURCES), 5))
    return G @ G.transpose(0, 2, 1)


def row(step: int, seed: int = 0, **further: Any) -> Row:
    losses = np.array([-step, step, 0.5]) + seed
    K = gram(step, seed)
    return Row(step=step, losses=losses, gram=K, **{"wall_seconds": 0.5 * step, **further})


def assert_said(course: Course, table: pd.DataFrame, by: str) -> None:
    """A course is the table of an analyzer, number by number."""
    wide = table.pivot(index="step", columns=by, values="value")
    assert course.blocks == tuple(wide.columns)
    np.testing.assert_array_equal(course.values, wide.to_numpy())


def assert_says_what_the_file_says(seen: Followed, path: Path) -> None:
    view, run = seen.look(), open_run(path)
    assert view.steps == tuple(run.steps.tolist()) and view.state == run.state
    for courses, by in ((view.effects, "layer"), (view.totals, "model")):
        table = g_effect(run, by=by)
        for course in courses:
            assert_said(course, table[table["effect"] == course.name], by)
        assert {course.name for course in courses} == {*table["effect"]}
    assert_said(view.rates[0], conflict(run), "layer")
    assert view.rates[0].rate == pytest.approx(conflict(run)["value"].mean())
    losses = run.losses()
    assert {course.name for course in view.losses} == {*losses}
    for course in view.losses:
        np.testing.assert_array_equal(course.values[:, 0], losses[course.name])
    np.testing.assert_array_equal(view.seconds, run.column("wall_seconds"))


def test_it_waits_for_a_file_and_follows_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    seen = Followed(path)
    assert seen.look().state is State.WAITING
    assert "waiting for its first step" in seen.look().comes
    writer = RunWriter(path, PARAMETERS)
    for step in range(70):  # more than the first file has room for
        append(writer, row(step))
        if step % 9 == 0 or step in (63, 64):
            assert_says_what_the_file_says(seen, path)
    writer.close(complete=True)
    assert_says_what_the_file_says(seen, path)
    assert seen.look().comes == "complete: 70 steps"


def test_steps_that_stay_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.h5"
    writer, read, begins = RunWriter(path, PARAMETERS), rows.Rows.read, []

    def noting(self: rows.Rows, name: str, *how: Any) -> Any:
        begins.append((name, self.first))
        return read(self, name, *how)

    seen = Followed(path)
    monkeypatch.setattr(rows.Rows, "read", noting)
    for step in range(20):
        append(writer, row(step))
    seen.look()
    append(writer, row(20))
    begins.clear()
    seen.look()
    assert {first for name, first in begins if name == "gram"} == {20}
    writer.close(complete=False)
    os.utime(path, (0, 0))
    seen.look()
    begins.clear()
    assert len(seen.look().steps) == 21
    assert begins == [], "a file that was not written is not opened"


def test_a_row_that_is_amended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    writer, seen = RunWriter(path, PARAMETERS), Followed(path)
    for step in range(4):
        append(writer, row(step))
    assert_says_what_the_file_says(seen, path)
    writer.amend(row(3, seed=1))
    assert_says_what_the_file_says(seen, path)
    append(writer, row(4))
    assert_says_what_the_file_says(seen, path)


def test_rows_that_are_dropped_and_come_again_are_those_of_now(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", [row(step) for step in range(9)], complete=False)
    seen = Followed(path)
    assert_says_what_the_file_says(seen, path)
    writer = RunWriter(path, PARAMETERS, resume=True, drop_after=4)
    for step in range(5, 12):
        append(writer, row(step, seed=step % 2))
        assert_says_what_the_file_says(seen, path)
    writer.close(complete=True)
    assert_says_what_the_file_says(seen, path)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_run_that_takes_the_place_of_another_is_that_run(tmp_path: Path, count: int) -> None:
    path = recorded(tmp_path / "run.h5", [row(step) for step in range(5)])
    seen = Followed(path)
    assert_says_what_the_file_says(seen, path)
    recorded(path, [row(step, seed=1) for step in range(count)], overwrite=True)
    assert_says_what_the_file_says(seen, path)


def test_a_run_of_other_sources_takes_the_place_of_one(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", [row(step) for step in range(5)])
    seen = Followed(path)
    seen.look()
    writer = RunWriter(path, PARAMETERS, overwrite=True)
    writer.begin(Contents(("objective", "facts", "idle"), MANIFEST))
    for step in range(3):
        writer.append(row(step))
    view = seen.look()
    assert [course.name for course in view.effects] == ["facts", "idle"]
    assert_said(view.effects[0], cosine(open_run(path), "objective", "facts"), "layer")
    assert view.rates == () and "Cosines" in view.notes[0]


def test_steps_of_several_batches_are_their_means(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    writer, seen = RunWriter(path, PARAMETERS), Followed(path)
    for step in range(4):
        for batch in range(3):
            append(writer, row(step, seed=batch, batch=batch))
            assert_says_what_the_file_says(seen, path)


def test_a_loss_that_comes_late_and_one_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    writer, seen = RunWriter(path, PARAMETERS), Followed(path)
    for step in range(6):
        here = row(step)
        here.losses[1 if step < 3 else 2] = np.nan
        append(writer, here)
        assert_says_what_the_file_says(seen, path)


def test_a_run_of_a_rectifier_has_the_rate_of_violations(recorded: Path) -> None:
    view, run = Followed(recorded).look(), open_run(recorded)
    conflicts, violations = view.rates
    assert_said(conflicts, conflict(run), "model")
    assert_said(violations, violation(run), "model")
    assert violations.rate == violation(run)["value"].mean()
    assert [course.unit for course in view.totals][-1] == "nats per token"


def test_a_run_without_a_risk_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    writer = RunWriter(path, PARAMETERS)
    writer.begin(Contents(("objective", "update", "rectified"), MANIFEST))
    writer.append(row(0))
    view = Followed(path).look()
    assert view.effects == () and view.steps == (0,)
    assert "No G-effects: the run has objective, update, rectified" in view.notes[0]


def test_blocks_that_a_run_does_not_have_are_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", [row(0)])
    with pytest.raises(ValueError, match="experts"):
        Followed(path, "expert").look()


# What is not there, or not what it should be.


def test_what_is_no_run_is_refused_and_a_run_that_goes_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    path.write_text("no run")
    seen = Followed(path)
    with pytest.raises(RunFileError, match="not HDF5"):
        seen.look()
    path.unlink()
    assert seen.look().state is State.WAITING
    recorded(path, [row(0), row(1)])
    assert len(seen.look().steps) == 2
    path.write_text("no run any more")
    view = seen.look()
    assert len(view.steps) == 2 and "not HDF5" in view.notes[0]
    path.unlink()
    view = seen.look()
    assert view.state is State.WAITING and view.notes == ("The file that was there is gone.",)
    assert seen.look().notes == view.notes
    recorded(path, [row(0, seed=1)])
    assert_says_what_the_file_says(seen, path)


def test_a_row_that_is_being_written_is_read_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.h5"
    writer, seen = RunWriter(path, PARAMETERS), Followed(path)
    append(writer, row(0))
    kept = path.read_bytes()
    torn = kept.replace(gram(0).tobytes(), gram(1).tobytes())
    assert torn != kept
    path.write_bytes(torn)
    assert seen.look().state is State.WAITING, "the checksum of the row does not fit yet"
    path.write_bytes(kept)
    assert_says_what_the_file_says(seen, path)
    path.write_bytes(torn)
    assert "checksum" in seen.look().notes[0] and seen.look().steps == (0,)


def test_a_run_that_was_killed_says_how_long_it_was_not_written(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", [row(step) for step in range(3)], complete=None)
    seen = Followed(path)
    assert not seen.look().is_quiet
    aged = path.stat().st_mtime - 125
    os.utime(path, (aged, aged))
    view = seen.look()
    assert view.is_quiet and view.comes.startswith("not written for 2 min 5 s")
    assert_says_what_the_file_says(seen, path)


def test_a_slow_run_is_not_called_quiet(tmp_path: Path) -> None:
    slow = [row(step, wall_seconds=100.0 * step) for step in range(3)]
    path = recorded(tmp_path / "run.h5", slow, complete=None)
    aged = path.stat().st_mtime - 125
    os.utime(path, (aged, aged))
    assert not Followed(path).look().is_quiet


def test_a_file_whose_rows_were_all_dropped_waits(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", plain_rows(2), complete=False)
    RunWriter(path, PARAMETERS, resume=True, drop_after=-1).close(complete=True)
    view = Followed(path).look()
    assert view.steps == ()


# What comes next.


@pytest.mark.parametrize(
    ("ranges", "after", "comes"),
    [
        ([[0, 20, 5]], 0, 5),
        ([[0, 20, 5]], 3, 5),
        ([[0, 20, 5]], 20, None),
        ([[0, 20, 5], [27, 27, 1]], 20, 27),
        ([[4, 8, 2]], -1, 4),
        ([], 3, None),
    ],
)
def test_the_next_step_of_a_plan(ranges: list[list[int]], after: int, comes: int | None) -> None:
    steps = [step for first, last, apart in ranges for step in range(first, last + 1, apart)]
    assert Planned(len(steps), ranges).after(after) == comes
    assert comes == next((step for step in steps if step > after), None)


@pytest.mark.parametrize(
    ("steps", "planned", "said"),
    [
        ([0, 5], {"steps": 4, "ranges": [[0, 15, 5]]}, "next: step 10; written"),
        ([0, 5, 10, 15], {"steps": 4, "ranges": [[0, 15, 5]]}, "4 steps of 4 planned, written"),
        ([0, 5], None, "next: step 10, if it goes on as the last ones; written"),
        ([0, 5, 7], None, "3 steps, written"),
        ([3], None, "1 step, written"),
        (
            [0, 5],
            {"steps": 4, "ranges": []},
            "next: step 10, if it goes on as the last ones; written",
        ),
        ([0, 5], {"steps": 4, "ranges": [[0, 1, 0]]}, "next: step 10, if it goes on"),
        ([0, 5], {"steps": "4", "ranges": 7}, "next: step 10, if it goes on"),
        ([0, 5], [3], "next: step 10, if it goes on"),
        ([0, 5], {"steps": -4, "ranges": [[0, 15, 5]]}, "next: step 10, if it goes on"),
    ],
)
def test_what_comes_next(tmp_path: Path, steps: list[int], planned: Any, said: str) -> None:
    path = tmp_path / "run.h5"
    writer = RunWriter(path, PARAMETERS)
    told = MANIFEST if planned is None else {**MANIFEST, "planned": planned}
    writer.begin(Contents(SOURCES, told))
    for step in steps:
        writer.append(row(step))
    assert Followed(path).look().comes.startswith(said)


def test_a_second_request_does_not_follow_the_plan_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    writer = RunWriter(path, PARAMETERS)
    writer.begin(Contents(SOURCES, {**MANIFEST, "planned": {"steps": 9, "ranges": [[0, 8, 1]]}}))
    for request, step in ((0, 0), (0, 3), (1, 0), (1, 2), (1, 4)):
        writer.append(row(step, request=request))
    view = Followed(path).look()
    assert view.planned is None and view.next_step is None
    assert_says_what_the_file_says_of_requests(view, path)


def assert_says_what_the_file_says_of_requests(view: View, path: Path) -> None:
    values = g_effect(open_run(path), by="model")
    own = values[values["effect"] == "retaining"]["value"].to_numpy()
    np.testing.assert_array_equal(view.totals[1].values[:, 0], own)


def test_the_pace_is_that_of_the_last_steps(tmp_path: Path) -> None:
    slow = [row(step, wall_seconds=100.0 * step) for step in range(10)]
    fast = [row(8 + 2 * i, wall_seconds=900.0 + i) for i in range(1, 30)]
    view = Followed(recorded(tmp_path / "run.h5", [*slow, *fast])).look()
    assert view.step_seconds == 1.0
    assert view.steps_per_second == 2.0
    assert np.isnan(replace(view, steps=(1,), seconds=view.seconds[:1]).steps_per_second)


def test_bucketed_means_are_those_of_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=103)
    values[[3, 17, 40]] = np.nan
    values[50:60] = np.nan
    for most in (1, 7, 20, 102, 103, 200):
        found = bucketed(values, most)
        assert len(found) == min(most, len(values))
        places = [i * len(values) // len(found) for i in range(len(found) + 1)]
        for i, value in enumerate(found):
            own = values[places[i] : places[i + 1]]
            own = own[~np.isnan(own)]
            assert value == pytest.approx(own.mean()) if len(own) else np.isnan(value)
