"""Segments of gradients beside a run file: how they grow, are continued, and fail."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.store import Contents, Row, RunFileError, StoredGradients, open_run, segments, validate
from geffect.store.background import Writer
from geffect.store.shards import ShardWriter
from geffect.store.size import projected_bytes, remaining_bytes
from geffect.store.writer import RunWriter
from tests.utils.stored_gradients import (
    PARAMETERS,
    SOURCES,
    assert_same,
    contents,
    decoded,
    encoded,
    on_linux,
    record,
    room_for,
    row,
    shard,
)

pytestmark = pytest.mark.usefixtures("small_segments")


# Segments.


def test_segments_double_up_to_a_bound(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=25)  # 13 rows with gradients: 2, 4, 4 and 3 of 4
    folder = tmp_path / "a.gradients"
    rows = {}
    for file in sorted(folder.iterdir()):
        with h5py.File(file) as segment:
            rows[file.name] = len(segment["forget/head/values"])
    assert rows == {f"00{i}.rank0.h5": n for i, n in enumerate([2, 4, 4, 4])}


def test_what_is_not_written_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [Parameter("w", "layer 0", "deep", 0, "w", (1000, 1000), "float32", ())]
    stored = StoredGradients("full", (0,), (((0, 10**6),),))
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 10**9)
    to = RunWriter(tmp_path / "a.h5", wide)
    to.begin(Contents(("objective",), {"metadata": {}}, gradients=stored))
    arrays = {"objective": {"layer 0": {"values": np.ones(10**6, dtype="<f4")}}}
    to.append(Row(0, losses=np.zeros(1), gram=np.zeros((1, 1, 1)), gradients=arrays))
    to.close(complete=True)
    segment = (tmp_path / "a.gradients" / "000.rank0.h5").stat()
    assert segment.st_size > 8e6
    if segment.st_blocks * 512 > 8e6:
        pytest.skip("a file system without holes")
    assert segment.st_blocks * 512 < 4.1e6


@pytest.mark.parametrize("state", ["complete", "open", "killed"])
@pytest.mark.parametrize("first", [1, 4, 6])
def test_a_run_goes_on_within_a_segment(tmp_path: Path, first: int, state: str) -> None:
    path = tmp_path / "a.h5"
    killed = state == "killed"
    run = record(tmp_path, "full", steps=first, complete=None if killed else state == "complete")
    if killed:  # between the gradients of a row and the row
        beyond = ShardWriter(path, PARAMETERS, 0, first=-(-first // 2))
        beyond.begin(contents("full"))
        beyond.append(row(first, encoded(77, "full")))
        beyond.close(complete=False)
    resumed = RunWriter(path, PARAMETERS, resume=True)
    assert resumed.gradient_rows == -(-first // 2)
    resumed.begin(contents("full"))
    for step in range(first, 15):
        resumed.append(row(step, encoded(step, "full") if step % 2 == 0 else None))
    resumed.close(complete=True)
    run = open_run(path)
    assert run.stored_steps.tolist() == list(range(0, 15, 2))
    for step in run.stored_steps.tolist():
        assert_same(run.gradient("objective", step), decoded("objective", step))
    assert validate(path).whole


@pytest.mark.parametrize("ranks", [1, 3])
def test_dropped_rows_give_their_place_to_others(tmp_path: Path, ranks: int) -> None:
    record(tmp_path, "full", steps=12, ranks=ranks)
    path = tmp_path / "a.h5"
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=5)
    writers: list[Writer] = [
        resumed,
        *(
            ShardWriter(path, PARAMETERS, rank, first=resumed.gradient_rows)
            for rank in range(1, ranks)
        ),
    ]
    for to in writers:
        to.begin(contents("full", ranks))
    assert_same(open_run(path).gradient("forget", 10), decoded("forget", 10))
    for step in (6, 7, 8):
        for rank, to in reversed(list(enumerate(writers))):
            to.append(row(step, encoded(100 + step, "full", ranks, rank), of=100 + step))
    for to in writers:
        to.close(complete=True)
    run = open_run(path)
    assert run.stored_steps.tolist() == [0, 2, 4, 6, 7, 8]
    assert_same(run.gradient("forget", 4), decoded("forget", 4))
    assert_same(run.gradient("forget", 7), decoded("forget", 107))
    assert validate(path).whole


# What was there before.


def test_gradients_of_another_run_are_refused_or_replaced(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=12, ranks=3)
    path, folder = tmp_path / "a.h5", tmp_path / "a.gradients"
    (folder / "notes.txt").write_text("mine")
    (folder / ".000.rank0.h5.77.draft").write_text("half")
    shutil.copy(path, tmp_path / "kept.h5")
    path.unlink()
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(FileExistsError, match=r"Found segments in .*a\.gradients`\. Choose"):
        RunWriter(path, PARAMETERS)
    shutil.move(tmp_path / "kept.h5", path)
    with pytest.raises(FileExistsError, match=r"Found `.*a\.h5`"):
        RunWriter(path, PARAMETERS)
    anew = RunWriter(path, PARAMETERS, overwrite=True)
    anew.begin(contents("full", 2))
    assert sorted(file.name for file in folder.iterdir()) == before
    anew.append(row(0, None))
    of_rank_1 = [name for name in before if "rank1" in name]
    assert sorted(file.name for file in folder.iterdir()) == [*of_rank_1, "notes.txt"]
    second = shard(path)
    for to, rank in ((second, 1), (anew, 0)):
        to.append(row(1, encoded(1, "full", 2, rank)))
        to.close(complete=True)
    assert sorted(file.name for file in folder.iterdir()) == [
        "000.rank0.h5",
        "000.rank1.h5",
        "notes.txt",
    ]
    assert_same(open_run(path).gradient("forget", 1), decoded("forget", 1))


def test_overwriting_with_a_run_without_gradients_removes_them(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=12)
    anew = RunWriter(tmp_path / "a.h5", PARAMETERS, overwrite=True)
    anew.begin(Contents(SOURCES, {"metadata": {}}))
    anew.append(row(0, None))
    anew.close(complete=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_a_run_whose_gradients_are_lost_is_readable_and_not_continued(tmp_path: Path) -> None:
    run = record(tmp_path, "full", steps=3)
    shutil.rmtree(tmp_path / "a.gradients")
    before = run.path.read_bytes()
    assert len(open_run(run.path).gram()) == 3
    with pytest.raises(RunFileError, match=r"should be in .*a\.gradients`\. Found none.*together"):
        RunWriter(run.path, PARAMETERS, resume=True)
    assert run.path.read_bytes() == before


@on_linux
@pytest.mark.parametrize(("steps", "limit"), [(1, 100), (2, 100), (2, 40_000), (5, 9000)])
def test_a_full_disk_loses_no_gradient(tmp_path: Path, steps: int, limit: int) -> None:
    path = tmp_path / "a.h5"
    to = RunWriter(path, PARAMETERS)
    to.begin(contents("full"))
    for step in range(steps):
        to.append(row(step, encoded(step, "full")))
    should = rf"a\.h5` should be writable at step {steps}\. Found: \[Errno 27\].* whole, {steps} of"
    with room_for(limit), pytest.raises(RunFileError, match=should):
        to.append(row(steps, encoded(steps, "full")))
    to.close(complete=True)
    run = open_run(path)
    assert run.stored_steps.tolist() == list(range(steps))
    for step in range(steps):
        assert_same(run.gradient("forget", step), decoded("forget", step))
    resumed = RunWriter(path, PARAMETERS, resume=True)
    resumed.begin(contents("full"))
    resumed.append(row(steps, encoded(steps, "full")))
    resumed.close(complete=True)
    assert_same(open_run(path).gradient("forget", steps), decoded("forget", steps))
    assert validate(path).whole
    assert not list(tmp_path.rglob("*.draft"))


@on_linux
@pytest.mark.parametrize("limit", [100, 40_000])
def test_a_disk_too_full_for_the_first_row_keeps_nothing(tmp_path: Path, limit: int) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    should = r"writable at step 0\. Found: \[Errno 27\] File too large.*Nothing of this run"
    with room_for(limit), pytest.raises(RunFileError, match=should):
        to.append(row(0, encoded(0, "full")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [1, 2])  # in the middle of a segment, and at its end
def test_a_folder_that_vanished_is_named(tmp_path: Path, written: int) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    for step in range(written):
        to.append(row(step, encoded(step, "full")))
    shutil.rmtree(tmp_path / "a.gradients")
    found = rf"step {written}\. Found: .*00{written - 1}\.rank0\.h5.*something was moved or removed"
    with pytest.raises(RunFileError, match=found) as caught:
        to.append(row(written, encoded(written, "full")))
    assert "whole" not in str(caught.value)
    assert len(open_run(to.path).gram()) == written


@pytest.mark.parametrize("wrong", [np.zeros(5, dtype="<f4"), np.zeros(4 * 37)])
def test_an_array_of_another_shape_is_refused_before_it_does_harm(
    tmp_path: Path, wrong: np.ndarray
) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    to.append(row(0, encoded(0, "full")))
    gradients = encoded(1, "full")
    gradients["forget"]["embedding"]["values"] = wrong
    with pytest.raises(ValueError, match=r"should be an array \(148,\) of float32\. Found"):
        to.append(row(1, gradients))
    to.close(complete=True)
    assert_same(open_run(to.path).gradient("forget", 0), decoded("forget", 0))
    assert validate(to.path).whole


# How large it will be.


@pytest.mark.parametrize(("encoding", "ranks"), [("bf16", 1), ("int4", 1), ("full", 2)])
@pytest.mark.parametrize(("rows", "kept"), [(3, 1), (12, 12)])
def test_the_size_is_known_before(
    tmp_path: Path, encoding: str, ranks: int, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4_000_000)
    monkeypatch.setattr(segments, "FIRST_ROWS", 8)
    wide = [
        Parameter(f"layers.{i}.w", f"layer {i}", "deep", i, "w", (500, 301), "float32", ())
        for i in range(3)
    ]
    numel = 500 * 301
    cuts = [numel * rank // ranks for rank in range(ranks + 1)]
    ranges = tuple(((cuts[r], cuts[r + 1]),) * 3 for r in range(ranks))
    what = Contents(SOURCES, {}, gradients=StoredGradients(encoding, (0, 1, 2), ranges))
    path = tmp_path / "a.h5"
    for rank in reversed(range(ranks)):
        vector = torch.ones(cuts[rank + 1] - cuts[rank])
        layers = {f"layer {i}": ENCODINGS[encoding].encode(vector, 0) for i in range(3)}
        to: Writer = ShardWriter(path, wide, rank) if rank else RunWriter(path, wide, resume=True)
        to.begin(what)
        for step in range(rows):
            gradients = dict.fromkeys(SOURCES, layers) if step < kept else None
            to.append(Row(step, losses=np.zeros(2), gram=np.zeros((3, 2, 2)), gradients=gradients))
        to.close(complete=True)
    taken = path.stat().st_size + sum(
        file.stat().st_blocks * 512 for file in (tmp_path / "a.gradients").iterdir()
    )
    assert projected_bytes(wide, what, rows, kept) == pytest.approx(taken, rel=0.05)
    file, little = path.stat().st_size, 0.05 * taken
    assert remaining_bytes(path, wide, what, rows, kept) == pytest.approx(file, abs=little)
    further = projected_bytes(wide, what, rows, kept + 7) - projected_bytes(wide, what, rows, kept)
    remaining = remaining_bytes(path, wide, what, rows, kept + 7)
    assert remaining == pytest.approx(file + further, abs=little)
    assert remaining_bytes(tmp_path / "new.h5", wide, what, rows, kept) == projected_bytes(
        wide, what, rows, kept
    )
