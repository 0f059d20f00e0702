"""Gradients that are kept whole: in segments beside the run file, of one rank or of several."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.store import (
    Contents,
    Row,
    Run,
    RunFileError,
    StoredGradients,
    open_run,
    segments,
    validate,
)
from geffect.store.background import BackgroundWriter, Writer
from geffect.store.shards import ShardWriter
from geffect.store.size import projected_bytes, remaining_bytes
from geffect.store.writer import RunWriter
from tests.utils.subprocesses import in_another_process, locked_by_another_process

SOURCES = ("objective", "forget")
PARAMETERS = tuple(
    Parameter(f"{layer}.{i}", layer, "deep", 0, "weight", (3 + i, 37), "float32", ())
    for layer in ("embedding", "layer 0", "head")
    for i in range(3)
)
KEPT = (1, 3, 4, 5, 8)  # of the embedding and the head only a part
LAYERS = {"embedding": (1,), "layer 0": (3, 4, 5), "head": (8,)}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment holds two rows, and none more than four."""
    monkeypatch.setattr(segments, "FIRST_ROWS", 2)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4 * 2 * 4 * 37 * sum(3 + i % 3 for i in KEPT))


# What was written is read.


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_come_back_as_they_were_encoded(tmp_path: Path, encoding: str) -> None:
    run = record(tmp_path, encoding, steps=9)
    assert run.stored_steps.tolist() == [0, 2, 4, 6, 8]
    for step in run.stored_steps.tolist():
        for source in SOURCES:
            assert_same(run.gradient(source, step), decoded(source, step, encoding))
    assert validate(run.path).whole


@pytest.mark.parametrize("encoding", ["full", "bf16"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_together_hold_what_one_would(tmp_path: Path, encoding: str, ranks: int) -> None:
    run = record(tmp_path, encoding, steps=9, ranks=ranks)
    for step in run.stored_steps.tolist():
        for source in SOURCES:
            assert_same(run.gradient(source, step), decoded(source, step, encoding))
    assert validate(run.path).whole


@pytest.mark.parametrize(("encoding", "ranks"), [("int4", 1), ("bf16", 1), ("full", 3)])
def test_any_reader_of_hdf5_sees_them_in_the_run_file(
    tmp_path: Path, encoding: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, encoding, steps=9, ranks=ranks)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.h5", "a.gradients"):
        shutil.move(tmp_path / name, moved / name)
    monkeypatch.chdir(tmp_path)
    run = open_run(moved / "a.h5")
    with h5py.File(run.path) as file:
        assert file["gradients"].attrs["encoding"] == encoding
        numbers = file["stored"][:]
        assert numbers[:, 0].tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4]
        for source in SOURCES:
            group = file["gradients"][source]
            assert {layer: tuple(group[layer].attrs["parameters"]) for layer in group} == LAYERS
            for layer, found in zip(LAYERS, run.gradient(source, 6), strict=True):
                arrays = {name: group[layer][name][3] for name in group[layer]}
                assert np.array_equal(ENCODINGS[encoding].decode(arrays, found.size), found)


def test_what_is_missing_is_nan_to_other_readers_and_an_error_to_ours(tmp_path: Path) -> None:
    run = record(tmp_path, "bf16", steps=9)
    (tmp_path / "a.gradients" / "000.rank0.h5").unlink()
    assert_same(run.gradient("forget", 8), decoded("forget", 8, "bf16"))
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should hold .* step 2 .*No such file"):
        run.gradient("forget", 2)
    with h5py.File(run.path) as file:
        bits = file["gradients/forget/head/bits"][1]
    assert np.isnan(ENCODINGS["bf16"].decode({"bits": bits}, bits.size)).all()
    assert run.gram().shape == (9, 9, 2, 2)
    assert len(validate(run.path).problems) == 2


def test_a_segment_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    run = record(tmp_path, "full", steps=3)
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    segment.write_bytes(segment.read_bytes()[:-1000])
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should hold .* step 2 .* Found"):
        run.gradient("forget", 2)


def test_a_gradient_of_several_rows_is_their_mean(tmp_path: Path) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    for batch, gradients in enumerate([encoded(0, "full"), encoded(1, "full"), None]):
        to.append(row(5, gradients, batch=batch))
    to.close(complete=True)
    found = open_run(to.path).gradient("forget", 5)
    for at, a, b in zip(found, decoded("forget", 0), decoded("forget", 1), strict=True):
        assert np.allclose(at, (a + b) / 2, atol=1e-6)


def test_a_source_that_was_absent_is_named_and_not_zero(tmp_path: Path) -> None:
    to = RunWriter(tmp_path / "a.h5", PARAMETERS)
    to.begin(contents("full"))
    to.append(row(0, {"objective": encoded(0, "full")["objective"]}))
    to.append(row(1, encoded(1, "full")))
    to.append(row(2, None))
    to.close(complete=True)
    run = open_run(to.path)
    assert run.stored_steps.tolist() == [0, 1]
    for step in (0, 2):
        with pytest.raises(ValueError, match=rf"`forget` was kept: \[1\]\. Found {step}\."):
            run.gradient("forget", step)


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
            to.append(row(step, encoded(100 + step, "full", ranks, rank)))
    for to in writers:
        to.close(complete=True)
    run = open_run(path)
    assert run.stored_steps.tolist() == [0, 2, 4, 6, 7, 8]
    assert_same(run.gradient("forget", 4), decoded("forget", 4))
    assert_same(run.gradient("forget", 7), decoded("forget", 107))
    assert validate(path).whole


# Ranks that are not at one.


def test_what_another_rank_did_not_write_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    first, second = RunWriter(path, PARAMETERS), shard(path)
    first.begin(contents("full", 2))
    for step in range(3):
        if step < 2:
            second.append(row(step, encoded(step, "full", 2, 1)))
        first.append(row(step, encoded(step, "full", 2, 0)))
    run = open_run(path)
    assert_same(run.gradient("forget", 1), decoded("forget", 1))
    with pytest.raises(RunFileError, match=r"001\.rank1\.h5` should hold .* step 2 .*Found"):
        run.gradient("forget", 2)
    assert [problem.split("`")[1] for problem in validate(path).problems] == [
        str(tmp_path / "a.gradients" / "001.rank1.h5")
    ]
    second.append(row(2, encoded(2, "full", 2, 1)))
    assert_same(run.gradient("forget", 2), decoded("forget", 2))
    second.append(row(3, encoded(3, "full", 2, 1)))  # beyond what rank 0 counts
    assert run.stored_steps.tolist() == [0, 1, 2]
    assert validate(path).whole
    second.append(row(9, encoded(3, "full", 2, 1)))
    first.append(row(3, encoded(3, "full", 2, 0)))
    first.append(row(4, encoded(4, "full", 2, 0)))
    with pytest.raises(RunFileError, match=r"rank1\.h5` should hold .* step 4 .* of another step"):
        open_run(path).gradient("forget", 4)
    for to in (first, second):
        to.close(complete=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("written", [0, 1, 3])
def test_gradients_that_a_killed_rank_did_not_write_come_again(
    tmp_path: Path, written: int, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.h5"
    first, second = RunWriter(path, PARAMETERS), shard(path)
    first.begin(contents("full", 2))
    for step in range(5):
        first.append(row(step, encoded(step, "full", 2, 0)))
        if step < written:
            second.append(row(step, encoded(step, "full", 2, 1)))
    for to in (first, second):
        to.close(complete=False)
    resumed = RunWriter(path, PARAMETERS, resume=True)
    assert open_run(path).stored_steps.tolist() == list(range(5))
    assert (resumed.count, resumed.gradient_rows) == (5, written)
    assert f"{5 - written} rows of {path}, from step {written} on" in caplog.text
    writers: list[Writer] = [resumed, ShardWriter(path, PARAMETERS, 1, first=written)]
    if background:
        writers = [BackgroundWriter(to, bound_bytes=10**6) for to in writers]
    for rank, to in enumerate(writers):
        to.begin(contents("full", 2))
        for step in range(5, 8):
            to.append(row(step, encoded(step, "full", 2, rank)))
        to.keep("done", {"rank": np.array([rank])})
    for to in writers:
        to.close(complete=True)
    run = open_run(path)
    assert run.steps.tolist() == list(range(8))
    assert run.stored_steps.tolist() == [*range(written), 5, 6, 7]
    for step in run.stored_steps.tolist():
        assert_same(run.gradient("forget", step), decoded("forget", step))
    assert run.table("done")["rank"].tolist() == [0]
    assert validate(path).whole


def test_a_run_with_torn_gradients_is_whole_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    run = record(tmp_path, "full", steps=5, ranks=2)
    (tmp_path / "a.gradients" / "001.rank1.h5").unlink()
    assert not validate(path).whole
    RunWriter(path, PARAMETERS, resume=True).close(complete=False)
    assert not validate(path).whole
    RunWriter(path, PARAMETERS, resume=True).close(complete=True)
    assert validate(path).whole
    assert open_run(path).stored_steps.tolist() == [0, 2]
    assert np.array_equal(open_run(path).gram(), run.gram())


def test_gradients_that_are_lost_amid_others_are_not_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    record(tmp_path, "full", steps=9, ranks=2)
    lost = tmp_path / "a.gradients" / "000.rank1.h5"
    content = lost.read_bytes()
    lost.unlink()
    resumed = RunWriter(path, PARAMETERS, resume=True)
    assert resumed.gradient_rows == 5
    resumed.close(complete=True)
    with pytest.raises(RunFileError, match=r"000\.rank1\.h5` should hold .* step 2"):
        open_run(path).gradient("forget", 2)
    lost.write_bytes(content)
    assert validate(path).whole


def test_a_further_rank_of_a_run_without_parts_writes_nothing(tmp_path: Path) -> None:
    for what in (contents("full"), Contents(SOURCES, {})):
        to = ShardWriter(tmp_path / "a.h5", PARAMETERS, 1)
        to.begin(what)
        to.append(row(0, encoded(0, "full")))
        to.close(complete=True)
    assert not list(tmp_path.iterdir())


def test_a_further_rank_needs_no_row_of_the_others(tmp_path: Path) -> None:
    to = shard(tmp_path / "a.h5")
    to.append(row(0, None))
    assert not list(tmp_path.iterdir())
    to.append(row(1, encoded(1, "full", 2, 1)))
    to.close(complete=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["a.gradients", "000.rank1.h5"]


def test_a_second_writer_of_a_rank_is_refused(tmp_path: Path) -> None:
    to = shard(tmp_path / "a.h5")
    to.append(row(0, encoded(0, "full", 2, 1)))
    to.close(complete=False)
    late = ShardWriter(tmp_path / "a.h5", PARAMETERS, 1, first=1)
    late.begin(contents("full", 2))
    with (
        locked_by_another_process(tmp_path / "a.gradients" / "000.rank1.h5"),
        pytest.raises(RunFileError, match=r"rank 1 should be writable at step 1.*lock.*rank1\.h5"),
    ):
        late.append(row(1, encoded(1, "full", 2, 1)))


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


def test_gradients_need_no_torch_to_be_read(tmp_path: Path) -> None:
    record(tmp_path, "int4", steps=2)
    code = """
        import sys, geffect
        from geffect.store import segments, validate
        segments.FIRST_ROWS = 2
        run = geffect.open_run(sys.argv[1])
        run.gradient("forget", 0), validate(sys.argv[1])
        print([name for name in ("torch", "pandas") if name in sys.modules])
    """
    assert in_another_process(code, tmp_path / "a.h5") == "[]"


# What goes wrong.

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a file's size")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """As long as the block lasts, no file grows beyond so many bytes."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


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


@on_linux
def test_a_full_disk_of_a_further_rank_is_named(tmp_path: Path) -> None:
    to = shard(tmp_path / "a.h5")
    to.append(row(0, encoded(0, "full", 2, 1)))
    should = r"rank 1 should be writable at step 1\. Found: \[Errno 27\].*000\.rank1\.h5"
    with room_for(1000), pytest.raises(RunFileError, match=should):
        to.append(row(1, encoded(1, "full", 2, 1)))


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


def test_a_folder_that_vanished_is_named_on_a_further_rank(tmp_path: Path) -> None:
    to = shard(tmp_path / "a.h5")
    to.append(row(0, encoded(0, "full", 2, 1)))
    shutil.rmtree(tmp_path / "a.gradients")
    with pytest.raises(RunFileError, match=r"rank 1 should be .* step 1.*no longer there.*rank1"):
        to.append(row(1, encoded(1, "full", 2, 1)))
    with pytest.raises(
        RunFileError, match=r"should be open on rank 1\. Found it closed, or failed"
    ):
        to.append(row(2, encoded(2, "full", 2, 1)))


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


# What the tests above are made of.


def ranges_of(ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every tensor in as many parts, of which the last rank has none of the smallest ones."""
    cuts = []
    for numel in (PARAMETERS[i].numel for i in KEPT):
        step = numel // ranks + 40
        cuts.append([*(min(step * rank, numel) for rank in range(ranks)), numel])
    return tuple(tuple((cut[rank], cut[rank + 1]) for cut in cuts) for rank in range(ranks))


def contents(encoding: str, ranks: int = 1) -> Contents:
    stored = StoredGradients(encoding, KEPT, ranges_of(ranks))
    return Contents(SOURCES, {"metadata": {}}, gradients=stored)


def vector_of(source: str, step: int, parameter: int) -> torch.Tensor:
    rng = np.random.default_rng([SOURCES.index(source), step, parameter])
    return torch.from_numpy(rng.standard_normal(PARAMETERS[parameter].numel).astype("f4"))


def encoded(
    step: int, encoding: str, ranks: int = 1, rank: int = 0
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What one rank holds of the gradients of a step."""
    parts = dict(zip(KEPT, ranges_of(ranks)[rank], strict=True))
    return {
        source: {
            layer: dict(
                ENCODINGS[encoding].encode(
                    torch.cat([vector_of(source, step, i)[slice(*parts[i])] for i in places]),
                    seed=step,
                )
            )
            for layer, places in LAYERS.items()
        }
        for source in SOURCES
    }


def decoded(source: str, step: int, encoding: str = "full") -> list[np.ndarray]:
    """What a reader is to find of a gradient, by layer."""
    numel = {layer: sum(PARAMETERS[i].numel for i in places) for layer, places in LAYERS.items()}
    arrays = encoded(step, encoding)[source]
    return [ENCODINGS[encoding].decode(arrays[layer], n) for layer, n in numel.items()]


def row(step: int, gradients: object, *, batch: int = 0) -> Row:
    gram = np.ones((len(PARAMETERS), 2, 2))
    return Row(step, np.zeros(2), gram, batch=batch, gradients=gradients)  # type: ignore[arg-type]


def shard(path: Path) -> ShardWriter:
    """The writer of the second of two ranks."""
    to = ShardWriter(path, PARAMETERS, 1)
    to.begin(contents("full", 2))
    return to


def record(
    folder: Path, encoding: str, *, steps: int, ranks: int = 1, complete: bool | None = True
) -> Run:
    """A run with gradients at every other step; as a killed writer leaves it without `complete`."""
    path = folder / "a.h5"
    first = RunWriter(path, PARAMETERS)
    further = [ShardWriter(path, PARAMETERS, rank) for rank in range(1, ranks)]
    for to in (first, *further):
        to.begin(contents(encoding, ranks))
    for step in range(steps):
        for rank, to in reversed(list(enumerate([first, *further]))):
            kept = encoded(step, encoding, ranks, rank) if step % 2 == 0 else None
            to.append(row(step, kept))
    left = path.read_bytes()
    for to in (first, *further):
        to.close(complete=bool(complete))
    if complete is None:
        path.write_bytes(left)
    return open_run(path)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [vector.dtype for vector in found] == [np.float32] * len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)
