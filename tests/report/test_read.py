"""What is read of a run: names, words of the manifest, and rows whose steps come again."""

from pathlib import Path

import numpy as np
import pytest

from geffect import open_run
from geffect.pages import Lines
from geffect.report.charts import OfRun, Scales
from geffect.report.read import check_once, names, objective_of, opened, rectifier_of
from geffect.store.schema import Contents, Row
from geffect.store.writer import RunWriter
from tests.utils.command_line import Ask
from tests.utils.many_runs import random_run
from tests.utils.runs import PARAMETERS


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({}, "not told"),
        ({"objective": None, "losses": "x"}, "not told"),
        ({"objective": {"name": "WGA", "options": {}}}, "WGA"),
        ({"losses": {"objective": {"forget": -1.0, "retain": 0.5}}}, "-1 forget + 0.5 retain"),
        ({"losses": {"objective": "loss"}}, "not told"),
    ],
)
def test_the_objective_in_words(manifest: dict, said: str) -> None:
    assert objective_of(manifest) == said


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "none"),
        ({"rule": None, "select": None, "scope": "model", "space": "update"}, "watches only"),
        ({"rule": None, "select": 0.005, "space": "update"}, "select 0.005, update space"),
        ({"rule": "nearest", "scope": "layer"}, "nearest, of each layer"),
    ],
)
def test_the_rectifier_in_words(told: dict | None, said: str) -> None:
    assert rectifier_of({"rectifier": told}) == said


@pytest.mark.parametrize("way", ["the same path", "a symbolic link", "a hard link"])
def test_a_file_that_is_given_twice_is_refused(way: str, ask: Ask, tmp_path: Path) -> None:
    path, other = random_run(tmp_path / "run.h5", 1, layers=1), tmp_path / "other.h5"
    if way == "a symbolic link":
        other.symlink_to(path)
    elif way == "a hard link":
        other.hardlink_to(path)
    else:
        other = path
    with pytest.raises(ValueError, match=r"given once each\. Found `.*` twice"):
        check_once([open_run(path), open_run(other)])
    code, _, err = ask("report", path, other, "-o", tmp_path / "page.html")
    assert code == 1 and "given once each" in err


def test_names_that_folders_do_not_tell_apart_are_numbered(tmp_path: Path) -> None:
    paths = [tmp_path / place / "a" / "run.h5" for place in ("x", "y")]
    for path in paths:
        path.parent.mkdir(parents=True)
        random_run(path, 1, layers=1)
    found = names([open_run(path) for path in (*paths, random_run(tmp_path / "other.h5", 1))])
    assert found == ["a/run (1)", "a/run (2)", "other"]


def test_rows_of_several_requests_are_counted(tmp_path: Path) -> None:
    """Steps 0, 1, 0, 1: the unlearning effect of the row n is n + 1, twice that in the model."""
    writer = RunWriter(tmp_path / "run.h5", PARAMETERS)
    writer.begin(Contents(("objective", "forget", "retain"), {"metadata": {}, "rectifier": None}))
    for n in range(4):
        gram = np.tile((n + 1) * np.eye(3), (2, 1, 1))
        gram[:, 0, 1] = gram[:, 1, 0] = n + 1
        writer.append(Row(step=n % 2, request=n // 2, losses=np.ones(3), gram=gram))
    writer.close(complete=True)
    (read,) = opened([open_run(tmp_path / "run.h5")], "layer")
    assert (read.across, read.steps) == ("row", [0, 1, 2, 3])
    own = read.block_effects[read.block_effects["effect"] == "unlearning"]
    assert own["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert own["value"].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    assert read.effect("unlearning").tolist() == [2.0, 4.0, 6.0, 8.0]


def test_steps_that_do_not_repeat_are_steps(tmp_path: Path) -> None:
    (read,) = opened([open_run(random_run(tmp_path / "run.h5", 3))], "layer")
    assert (read.across, read.steps) == ("step", [0, 1, 2])


def test_all_is_read_before_the_rows_are_let_go(tmp_path: Path) -> None:
    """Also the mean of the implicit weights, which charts ask for when all runs were read."""
    path = tmp_path / "run.h5"
    writer = RunWriter(path, PARAMETERS)
    manifest = {"metadata": {}, "rectifier": None}
    writer.begin(Contents(("objective", "forget", "retain"), manifest, weights=("tokens",)))
    gram, weights = np.tile(np.eye(3), (2, 1, 1)), np.array([[1.0, 1.5, 1.9, 2.0]])
    writer.append(Row(step=0, losses=np.ones(3), gram=gram, weights=weights))
    writer.close(complete=True)
    (read,) = opened([open_run(path)], "layer")
    path.unlink()
    (drawn,) = OfRun(read, Scales.of([read]), 1).weights()
    assert isinstance(drawn.chart, Lines)
    assert [(one.name, one.values) for one in drawn.chart.series] == [("tokens", [1.0])]
