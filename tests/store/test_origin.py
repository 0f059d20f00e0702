"""What `overwrite=True` replaces, and what it leaves where it is."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from geffect.store import open_run
from geffect.store.origin import is_run, is_segment
from geffect.store.shards import ShardWriter
from geffect.store.writer import RunWriter
from tests.fuzz.mutations import DAMAGES
from tests.fuzz.originals import Original, originals
from tests.utils.runs import PARAMETERS, append, plain_rows, recorded, row_of
from tests.utils.stored_gradients import PARAMETERS as STORED
from tests.utils.stored_gradients import assert_same, contents, decoded, encoded, record, row


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, ...]:
    return originals(tmp_path_factory.mktemp("originals"))


def text(path: Path) -> None:
    path.write_text("step,loss\n0,1.5\n")


def checkpoint(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(5000))


def results(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["accuracy"] = np.arange(3.0)


def results_of_a_run(path: Path) -> None:
    """A file of the user's that holds a run as one of its groups."""
    run = recorded(path.with_name("copied.h5"), plain_rows(2))
    with h5py.File(path, "w", libver=("v108", "v110")) as file, h5py.File(run) as copied:
        group = file.create_group("run")
        for name in copied:
            copied.copy(name, group)
        group.attrs.update(copied.attrs)
    run.unlink()


def results_of_that_format(path: Path) -> None:
    with h5py.File(path, "w", libver=("v108", "v110")) as file:
        file.attrs["format"] = np.bytes_("geffect results")
        file.attrs["state"] = np.bytes_("complete")
        file.attrs["format_version"] = 3
        file["gram"] = np.eye(3)


def cut_off_results(path: Path) -> None:
    results(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (text, "another kind of file, with 16 bytes"),
        (checkpoint, "another kind of file, with"),
        (zeros, "another kind of file, with 5,000 bytes"),
        (results, r"an HDF5 file of another kind, with \['accuracy'\]"),
        (results_of_a_run, r"an HDF5 file of another kind, with \['run'\]"),
        (results_of_that_format, r"an HDF5 file of another kind, with \['gram'\]"),
        (cut_off_results, "another kind of file, with 900 bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_run_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], None], found: str
) -> None:
    path = tmp_path / "results.h5"
    make(path)
    before = path.read_bytes()
    said = rf"should find a run file of geffect to replace\. Found {found}.* Choose another name"
    with pytest.raises(FileExistsError, match=said):
        RunWriter(path, PARAMETERS, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.h5"]


def test_a_segment_is_not_replaced_by_a_run(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=3)
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    before = segment.read_bytes()
    with pytest.raises(FileExistsError, match="Found a segment with the gradients of a run"):
        RunWriter(segment, PARAMETERS, overwrite=True)
    assert segment.read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_a_later_format(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99


def without_its_word(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["format"]


def with_a_hole(path: Path) -> None:
    stored = path.read_bytes()
    path.write_bytes(stored[:600] + bytes(3000) + stored[3600:])


@pytest.mark.parametrize(
    "damaged", [cut, emptied, of_a_later_format, without_its_word, with_a_hole]
)
def test_a_run_is_replaced_also_where_it_is_damaged(
    tmp_path: Path, damaged: Callable[[Path], None]
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    damaged(path)
    assert len(open_run(recorded(path, plain_rows(2), overwrite=True)).steps) == 2


def test_few_damages_hide_what_a_file_was(runs: tuple[Original, ...], tmp_path: Path) -> None:
    told = 0
    for seed in range(150):
        chance = random.Random(seed)
        path = runs[seed % len(runs)].put(tmp_path)
        chance.choice(DAMAGES)(path, chance)
        told += is_run(path)
    assert told > 135


def test_the_kinds_of_files_are_told_apart_in_each_format(
    runs: tuple[Original, ...], tmp_path: Path
) -> None:
    for i, run in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        path = run.put(tmp_path / str(i))
        (segment,) = path.with_suffix(".gradients").iterdir()
        assert [is_run(path), is_run(segment)] == [True, False]
        assert [is_segment(path), is_segment(segment)] == [False, True]


# Gradients of another run, under names that the run counts.


def of_another_run(folder: Path) -> Path:
    """A segment of a run that has another mark."""
    folder.mkdir()
    to = RunWriter(folder / "a.h5", STORED)
    held = contents("full")
    assert held.gradients is not None
    to.begin(replace(held, gradients=replace(held.gradients, mark=77)))
    to.append(row(0, encoded(5, "full")))
    to.close(complete=True)
    return folder / "a.gradients" / "000.rank0.h5"


def test_overwriting_leaves_a_segment_of_another_run_that_has_a_counted_name(
    tmp_path: Path,
) -> None:
    path = record(tmp_path, "full", steps=3).path
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    shutil.copy(of_another_run(tmp_path / "other"), segment)
    before, run = segment.read_bytes(), path.read_bytes()
    with pytest.raises(FileExistsError, match=r"Found 000\.rank0\.h5 in .*does not count as its"):
        RunWriter(path, STORED, overwrite=True)
    assert (segment.read_bytes(), path.read_bytes()) == (before, run)


def test_a_segment_of_another_run_that_came_meanwhile_is_left(tmp_path: Path) -> None:
    path = record(tmp_path, "full", steps=3).path
    late = RunWriter(path, STORED, overwrite=True)
    late.begin(contents("full"))
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    shutil.copy(of_another_run(tmp_path / "other"), segment)
    before = segment.read_bytes()
    with pytest.raises(FileExistsError, match=r"Found 000\.rank0\.h5 in"):
        late.append(row(0, encoded(0, "full")))
    late.close(complete=False)
    assert segment.read_bytes() == before


def test_a_damaged_segment_goes_with_its_run(tmp_path: Path) -> None:
    path = record(tmp_path, "full", steps=3).path
    segment = tmp_path / "a.gradients" / "000.rank0.h5"
    segment.write_bytes(segment.read_bytes()[:900])
    recorded(path, [row_of(0)], overwrite=True)
    assert not segment.exists()


def test_two_runs_that_share_a_folder_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    first, second = (RunWriter(tmp_path / name, STORED) for name in ("a.h5", "a.hdf5"))
    held = contents("full")
    assert held.gradients is not None
    first.begin(replace(held, gradients=replace(held.gradients, mark=5)))
    second.begin(replace(held, gradients=replace(held.gradients, mark=6)))
    second.append(row(0, None))
    first.append(row(0, encoded(0, "full")))
    with pytest.raises(OSError, match=r"step 1\. Found: .*The gradients of another run are there"):
        second.append(row(1, encoded(1, "full")))
    first.close(complete=True)
    assert_same(open_run(first.path).gradient("forget", 0), decoded("forget", 0))
    assert len(open_run(second.path).steps) == 1


def test_further_ranks_may_have_written_before_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writers = (RunWriter(path, STORED), ShardWriter(path, STORED, 1))
    for to in writers:
        to.begin(contents("full", 2))
    for rank in (1, 0):
        writers[rank].append(row(0, encoded(0, "full", 2, rank)))
    for to in writers:
        to.close(complete=True)
    assert_same(open_run(path).gradient("forget", 0), decoded("forget", 0))


def test_what_is_written_first_to_an_empty_file_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.h5").touch()
    to = RunWriter(tmp_path / "a.h5", PARAMETERS, overwrite=True)
    append(to, row_of(0))
    to.close(complete=True)
    assert is_run(tmp_path / "a.h5")
