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


def test_what_a_reader_changes_is_its_own(run: Run) -> None:
    kept = held(run)
    kept.gram()[:] = 0.0
    kept.column("step")[:] = 7
    assert kept.gram().any() and kept.column("step").tolist() == [0, 1, 2, 3, 4, 5]


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
