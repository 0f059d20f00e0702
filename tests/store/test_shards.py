"""Gradients that each rank writes a part of, and ranks that disagree."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from geffect.store import Contents, RunFileError, open_run, validate
from geffect.store.background import BackgroundWriter, Writer
from geffect.store.shards import ShardWriter
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
from tests.utils.subprocesses import locked_by_another_process

pytestmark = pytest.mark.usefixtures("small_segments")


@pytest.mark.parametrize("encoding", ["full", "bf16"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_together_hold_what_one_would(tmp_path: Path, encoding: str, ranks: int) -> None:
    run = record(tmp_path, encoding, steps=9, ranks=ranks)
    for step in run.stored_steps.tolist():
        for source in SOURCES:
            assert_same(run.gradient(source, step), decoded(source, step, encoding))
    assert validate(run.path).whole


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


@on_linux
def test_a_full_disk_of_a_further_rank_is_named(tmp_path: Path) -> None:
    to = shard(tmp_path / "a.h5")
    to.append(row(0, encoded(0, "full", 2, 1)))
    should = r"rank 1 should be writable at step 1\. Found: \[Errno 27\].*000\.rank1\.h5"
    with room_for(1000), pytest.raises(RunFileError, match=should):
        to.append(row(1, encoded(1, "full", 2, 1)))


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
