"""Runs that stay in memory: they say what the file says, and read it once."""

from pathlib import Path

import numpy as np
import pytest

from geffect import open_run
from geffect.analysis import g_effect, rectification
from geffect.report.held import held
from geffect.store import Run
from tests.utils.many_runs import random_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(random_run(tmp_path_factory.mktemp("run") / "run.h5", 6, rectified=True))


def test_it_says_what_the_file_says(run: Run) -> None:
    kept = held(run)
    for _ in range(2):
        assert np.array_equal(kept.gram(), run.gram())
        assert g_effect(kept).equals(g_effect(run))
        assert rectification(kept).equals(rectification(run))
        assert all(np.array_equal(kept.losses()[name], v) for name, v in run.losses().items())


def test_nobody_changes_what_it_holds(run: Run) -> None:
    with pytest.raises(ValueError, match="read-only"):
        held(run).gram()[:] = 0.0


def test_what_is_made_of_it_is_made_once(run: Run) -> None:
    kept, made = held(run), iter(range(2))
    assert [kept.once("a", lambda: next(made)) for _ in range(2)] == [0, 0]
    kept.let_go()
    assert kept.once("a", lambda: next(made)) == 1


def test_other_rows_of_it_are_not_taken_for_its_own(run: Run) -> None:
    kept = held(run)
    for own, expected in (
        (kept, run),
        (kept.latest(2), run.latest(2)),
        (kept.until(3), run.until(3)),
    ):
        assert np.array_equal(own.gram(), expected.gram())
        assert g_effect(own).equals(g_effect(expected))


def test_the_file_is_read_once_until_it_is_let_go(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    path.write_bytes(run.path.read_bytes())
    kept = held(open_run(path))
    first = kept.gram()
    path.unlink()
    assert np.array_equal(kept.gram(), first)
    kept.let_go()
    with pytest.raises(OSError, match="should exist"):
        kept.gram()
