"""A run whose file is no longer the one that was opened: nothing of another is read as its own."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geffect.store import Run, RunFileError, open_run
from geffect.store.schema import STEP_COLUMNS
from geffect.store.writer import RunWriter
from tests.utils.runs import (
    PARAMETERS,
    append,
    assert_same_bits,
    contents_of,
    plain_rows,
    recorded,
    row_of,
)

READS: dict[str, Callable[[Run], Any]] = {
    "gram": Run.gram,
    "one entry": lambda run: run.read("gram", 0, 0, 1),
    "losses": Run.losses,
    **{name: lambda run, name=name: run.column(name) for name in STEP_COLUMNS},
    "checksums": lambda run: run.checksums(),
    "latest": lambda run: run.latest(1).gram(),
    "tables": lambda run: run.tables,
    "table": lambda run: run.table("t"),
}


def another(path: Path, rows: list[Any], of: str) -> Path:
    """A file with these rows, of a run with another manifest."""
    writer = RunWriter(path, PARAMETERS)
    writer.begin(replace(contents_of(rows[0]), manifest={"metadata": {"method": of}}))
    for row in rows:
        writer.append(row)
    writer.keep("t", {"x": np.arange(2)})
    writer.close(complete=True)
    return path


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_another_run_of_the_same_steps_is_not_read_as_the_one_that_was_opened(
    read: Callable[[Run], Any], tmp_path: Path
) -> None:
    path = another(tmp_path / "a.h5", plain_rows(3), "GA")
    run = open_run(path)
    read(run)
    os.replace(another(tmp_path / "b.h5", [row_of(i, value=7.0) for i in range(3)], "NPO"), path)
    with pytest.raises(RunFileError, match=r"should hold the run that was opened there.*Open it"):
        read(run)
    assert (open_run(path).gram() == 7.0).all()


@pytest.mark.parametrize("steps", [[3, 5, 7, 9], [5], [4, 5, 6], []])
def test_other_steps_in_rows_of_a_run_are_not_read_as_those_that_were_there(
    steps: list[int], tmp_path: Path
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(6))
    run, early = open_run(path), open_run(path).until(2)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=2)
    for step in steps:
        append(resumed, row_of(step))
    resumed.close(complete=True)
    with pytest.raises(RunFileError, match="resumed from an earlier step"):
        run.gram()
    assert_same_bits(early.gram(), [row.gram for row in plain_rows(3)])


def test_steps_that_were_recorded_again_are_not_read_as_those_that_were_there(
    tmp_path: Path,
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(6))
    run, early = open_run(path), open_run(path).until(2)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=2)
    for step in (3, 4, 5):
        append(resumed, row_of(step, value=7.0))
    resumed.close(complete=True)
    for read in (run.gram, run.losses, lambda: run.latest(2).gram(), lambda: run.until(3).gram()):
        with pytest.raises(RunFileError, match="resumed from an earlier step"):
            read()
    assert_same_bits(early.gram(), [row.gram for row in plain_rows(3)])


def test_what_comes_to_a_run_makes_no_other_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = RunWriter(path, PARAMETERS)
    append(writer, row_of(0))
    run = open_run(path)
    for step in range(1, 200):  # which takes larger files in its place
        append(writer, row_of(step))
    writer.keep("t", {"x": np.arange(2)})
    for _ in range(2):
        assert_same_bits(run.gram(), [row_of(0).gram])
        assert run.tables == ("t",)
        writer.close(complete=True)


def test_a_row_that_comes_again_is_read_as_it_is_now(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    run = open_run(path)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=1)
    append(resumed, row_of(2, value=7.0))
    resumed.close(complete=True)
    assert run.gram()[:, 0, 0, 0].tolist() == [1.0, 4.0, 7.0]
