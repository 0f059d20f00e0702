"""What `validate` says of a run file."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from geffect.store import open_run, validate
from geffect.store.writer import RunWriter
from tests.utils.runs import PARAMETERS, append, damage, plain_rows, recorded, row_of


def test_a_whole_run_has_no_problems(tmp_path: Path) -> None:
    health = validate(recorded(tmp_path / "a.h5", plain_rows(3)))
    assert (health.steps, health.complete, health.whole) == (3, True, True)
    assert (health.problems, health.remarks) == ((), ())


@pytest.mark.parametrize("lost", ["tables", "tables/samples", "tables/samples/value"])
@pytest.mark.parametrize("kept", [True, False], ids=["tables", "no tables"])
def test_tables_that_were_removed_are_missed(tmp_path: Path, lost: str, kept: bool) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    if kept:
        to.keep("samples", {"value": np.arange(3.0)})
        to.keep("others", {"value": np.arange(2.0)})
    append(to, row_of(0))
    to.close(complete=True)
    with h5py.File(to.path, "r+") as file:
        if lost in file:
            del file[lost]
    health = validate(to.path)
    assert health.whole == (lost != "tables" and not kept)
    assert all(f"no `{lost.split('/')[-1]}`" in problem for problem in health.problems)
    if lost != "tables" and kept:
        assert open_run(to.path).table("others")["value"].tolist() == [0.0, 1.0]


def test_an_open_run_is_whole_and_remarked_on(tmp_path: Path) -> None:
    health = validate(recorded(tmp_path / "a.h5", plain_rows(3), complete=None))
    assert (health.steps, health.complete, health.whole) == (3, False, True)
    assert health.remarks == ("the recorder was not closed: being recorded, or killed",)


def test_a_half_written_row_is_not_shown_and_remarked_on(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3), complete=None)
    damage(path, "gram", (3, 0), 1e9)
    health = validate(path)
    assert (health.steps, health.whole) == (3, True)
    assert "one step was written but not committed, and is not shown" in health.remarks
    assert len(open_run(path).gram()) == 3


@pytest.mark.parametrize(
    ("name", "where", "value", "problem"),
    [
        ("gram", (1, 0, 0, 1), -1.0, "a Gram matrix is not symmetric"),
        ("gram", (1, 0, 0, 1), np.nan, "a Gram matrix is not symmetric"),
        ("gram", (0, 1, 1, 1), -4.0, "a squared norm of `forget` is negative"),
        ("gram", (2, 1, 2, 2), 1e-9, "`retain` and `objective` are beyond |a||b|"),
        ("steps/step", 1, 2, "the steps are not in increasing order"),
        ("steps/step", 2, 0, "the steps are not in increasing order"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, name: str, where: object, value: float, problem: str
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    damage(path, name, where, value)
    health = validate(path)
    assert not health.whole
    assert problem in health.problems


def test_experts_that_are_no_parts_of_their_tensor_are_named(tmp_path: Path) -> None:
    parameters = [replace(PARAMETERS[0], experts=3), PARAMETERS[1]]
    writer = RunWriter(path := tmp_path / "a.h5", parameters)
    for step in range(2):
        row = row_of(step)
        append(writer, replace(row, expert_gram=np.stack([row.gram[0] / 3] * 3)))
    writer.close(complete=True)
    assert validate(path).whole
    damage(path, "expert_gram", (1, 2, 0, 0), 1.0)
    assert "the experts of a tensor do not add up to it" in validate(path).problems


def test_two_entries_beyond_their_norms_are_named(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    for i, j in ((0, 1), (1, 0)):
        damage(path, "gram", (2, 0, i, j), -1e4)
    assert validate(path).problems == ("`forget` and `objective` are beyond |a||b|",)


def test_absent_sources_and_rounding_are_no_damage(tmp_path: Path) -> None:
    a, b = np.float64(1.0), np.float64(1.0 + 1e-9)
    vectors = np.array([b - a, a, b])
    K = np.tile(np.outer(vectors, vectors), (2, 1, 1))
    K[:, 0, 0] = -1e-17  # a difference of long gradients: rounding left less than nothing
    K[:, 0, 2] *= 1 + 1e-15
    absent = np.full_like(K, np.nan)
    absent[:, 1, 1] = 1.0
    rows = [row_of(0, gram=K), row_of(1, gram=absent)]
    assert validate(recorded(tmp_path / "a.h5", rows)).problems == ()
