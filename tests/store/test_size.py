"""How large a run file will be, before it is written."""

import os
from pathlib import Path

import numpy as np
import pytest

from geffect.layers import Parameter
from geffect.sketch import Sketch
from geffect.store import Contents, Row, growing_file, open_run
from geffect.store.size import projected_bytes
from geffect.store.writer import RunWriter
from tests.utils.runs import MANIFEST, PARAMETERS, SOURCES, append, row_of


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("sketch", [None, Sketch(width=1000)])
def test_the_size_is_known_before(tmp_path: Path, rows: int, sketch: Sketch | None) -> None:
    parameters = [
        Parameter(f"layers.{i}.weight", f"layer {i}", "deep", i, "weight", (9,), "float32", ())
        for i in range(30)
    ]
    contents = Contents(SOURCES, MANIFEST, sketch=sketch)
    recording = RunWriter(tmp_path / "a.h5", parameters)
    recording.begin(contents)
    for step in range(rows):
        recording.append(
            Row(
                step,
                losses=np.zeros(3),
                gram=np.zeros((30, 3, 3)),
                sketches=sketch and np.zeros((3, 30, sketch.width), dtype="<f4"),
            )
        )
    recording.close(complete=True)
    size = recording.path.stat().st_size
    assert projected_bytes(parameters, contents, rows, 0) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("capacity", [40, None])
def test_no_more_is_taken_meanwhile_than_was_told(
    tmp_path: Path, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_file, "SPARE_BYTES", 100_000)
    contents = Contents(SOURCES, MANIFEST, sketch=Sketch(width=1000))
    told = projected_bytes(PARAMETERS, contents, 40, 0)
    taken = []
    synchronise = os.fsync

    def watching(file: int) -> None:  # the moment at which a draft is whole, beside what is there
        synchronise(file)
        taken.append(sum(found.stat().st_size for found in tmp_path.iterdir()))

    monkeypatch.setattr(os, "fsync", watching)
    to = RunWriter(tmp_path / "a.h5", PARAMETERS, rows=capacity)
    to.begin(contents)
    sketches = np.zeros((3, 2, 1000), dtype="<f4")
    for step in range(40):
        to.append(Row(step, losses=np.zeros(3), gram=np.zeros((2, 3, 3)), sketches=sketches))
    to.close(complete=True)
    assert max(taken) < told * (1.05 if capacity else 2.3)
    assert len(taken) == 1 if capacity else len(taken) < 14
    assert open_run(to.path).state == "complete"
    assert to.path.stat().st_size == pytest.approx(told, rel=0.05)
    if capacity:  # one more than there were to be
        resumed = RunWriter(to.path, PARAMETERS, resume=True, rows=capacity)
        resumed.begin(contents)
        resumed.append(Row(40, losses=np.zeros(3), gram=np.zeros((2, 3, 3)), sketches=sketches))
        assert open_run(to.path).state == "open"
        resumed.close(complete=True)
        assert len(open_run(to.path).steps) == 41
        assert open_run(to.path).state == "complete"


def test_a_plan_that_is_too_large_is_given_back(tmp_path: Path) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS, rows=1000)
    append(to, row_of(0))
    large = to.path.stat().st_size
    assert large > 1000 * 144
    to.close(complete=True)
    assert to.path.stat().st_size < large - 900 * 144
