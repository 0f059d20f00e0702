"""A writer and what stands in its way: files, other writers, rights, full disks."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from geffect.store import RunFileError, open_run, validate
from geffect.store.growing_file import FIRST_CAPACITY
from geffect.store.writer import RunWriter
from tests.utils.runs import (
    MANIFEST,
    PARAMETERS,
    append,
    damage,
    plain_rows,
    recorded,
    row_of,
    squared,
)
from tests.utils.subprocesses import in_a_fork, in_another_process, locked_by_another_process

# An existing file.


def test_an_existing_file_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"should not exist yet\. Found .*a\.h5`\. Choose"):
        RunWriter(path, PARAMETERS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_another_made_meanwhile_is_refused(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "a.h5"
    late = RunWriter(path, PARAMETERS)
    path.write_text("of another process")
    with pytest.raises(FileExistsError, match="made by another process since"):
        append(late, row_of(0))
    late.close(complete=False)
    assert path.read_text() == "of another process"
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_a_file_system_without_links_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refused)
    assert len(open_run(recorded(tmp_path / "a.h5", plain_rows(2))).steps) == 2


def test_overwriting_waits_for_the_first_step(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    before = path.read_bytes()
    RunWriter(path, PARAMETERS, overwrite=True).close(complete=True)
    assert path.read_bytes() == before
    new = RunWriter(path, PARAMETERS, overwrite=True)
    assert path.read_bytes() == before
    append(new, row_of(0, value=7.0))
    assert open_run(path).gram()[:, 0, 0, 0].tolist() == [7.0]
    new.close(complete=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_writer_that_was_closed_does_not_begin_again(tmp_path: Path, overwrite: bool) -> None:
    closed = RunWriter(tmp_path / "a.h5", PARAMETERS, overwrite=overwrite)
    for row in plain_rows(3):
        append(closed, row)
    closed.close(complete=True)
    with pytest.raises(RunFileError, match=r"should be open\. Found it closed.*resume=True"):
        append(closed, row_of(3))
    closed.close(complete=True)
    assert open_run(closed.path).steps.tolist() == [0, 1, 2]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"should exist\. Found no folder .*no`\. Create"):
        RunWriter(tmp_path / "no" / "a.h5", PARAMETERS)


def test_a_change_of_the_working_directory_does_not_move_the_file(
    small_capacity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = RunWriter("a.h5", PARAMETERS)
    append(relative, row_of(0))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for step in range(1, 9):
        append(relative, row_of(step))
    relative.close(complete=True)
    assert len(open_run(tmp_path / "a.h5").steps) == 9
    assert not list((tmp_path / "elsewhere").iterdir())


# Resume.


@pytest.mark.parametrize("state", ["complete", "open", "killed"])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_resume_continues(small_capacity: None, tmp_path: Path, state: str, count: int) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(count), complete=state == "complete")
    if state == "killed":
        path = recorded(tmp_path / "killed.h5", plain_rows(count), complete=None)
        damage(path, "gram", slice(count, count + 1), 3.0)  # half of a row, never counted
    resumed = RunWriter(path, PARAMETERS, resume=True)
    assert (resumed.count, resumed.last_step) == (count, count - 1)
    for row in plain_rows(6, first=count):
        append(resumed, row)
    assert open_run(path).state == "open"
    resumed.close(complete=True)
    run = open_run(path)
    assert run.state == "complete"
    assert run.steps.tolist() == list(range(count + 6))
    assert run.gram()[:, 0, 0, 0].tolist() == [squared(step) for step in range(count + 6)]
    assert run.manifest == MANIFEST
    assert validate(path).whole


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    assert len(open_run(recorded(tmp_path / "a.h5", plain_rows(2), resume=True)).steps) == 2


@pytest.mark.parametrize("complete", [True, False])
def test_resume_without_a_step_leaves_the_file_as_it_was(tmp_path: Path, complete: bool) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3), complete=complete)
    before = path.read_bytes()
    idle = RunWriter(path, PARAMETERS, resume=True)
    assert open_run(path).state == ("complete" if complete else "open")
    idle.close(complete=False)
    assert path.read_bytes() == before


def test_resume_can_close_what_was_left_open(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3), complete=False)
    RunWriter(path, PARAMETERS, resume=True).close(complete=True)
    assert open_run(path).state == "complete"
    assert len(open_run(path).steps) == 3


def test_resume_refuses_other_parameters_and_can_be_tried_again(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    before = path.read_bytes()
    first, head = PARAMETERS
    for others, found in (
        ([first], r"Found 1 that differ.*`lm_head\.weight`: none instead of .*another file"),
        ([replace(first, dtype="float64"), head], r"\(2, 3\) of float64 instead of .* of float32"),
        ([replace(first, shape=(3, 2)), head], r"\(3, 2\) of float32 instead of \(2, 3\)"),
        ([head, first], r"in another order, \['lm_head\.weight', 'layers\.0\.weight'\] first"),
    ):
        with pytest.raises(ValueError, match=found):
            RunWriter(path, others, resume=True)
    assert path.read_bytes() == before
    RunWriter(path, PARAMETERS, resume=True).close(complete=True)


# Two at once.


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_writer_of_this_process_is_refused(tmp_path: Path, how: dict[str, bool]) -> None:
    first = RunWriter(tmp_path / "a.h5", PARAMETERS)
    append(first, row_of(0))
    for path in (first.path, tmp_path / "." / "a.h5"):
        with pytest.raises(RunFileError, match=r"one writer.*or callback of this process"):
            RunWriter(path, PARAMETERS, **how)
    append(first, row_of(1))
    first.close(complete=True)
    assert len(open_run(first.path).steps) == 2
    RunWriter(first.path, PARAMETERS, resume=True).close(complete=True)


SECOND_WRITER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from tests.utils.runs import PARAMETERS, damage, RunWriter, append, row_of
    try:
        second = RunWriter(sys.argv[1], PARAMETERS, {how}=True)
        append(second, row_of(1, value=-1.0))
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_second_writer_of_another_process_is_refused(
    small_capacity: None, tmp_path: Path, how: str
) -> None:
    first = RunWriter(tmp_path / "a.h5", PARAMETERS)
    for step in range(6):  # past the first growth: the file that took the place is locked as well
        append(first, row_of(step))
    said = in_another_process(SECOND_WRITER.format(how=how), first.path, Path(__file__).parents[2])
    assert said.startswith("RunFileError A run file should have one writer. Found that")
    assert str(first.path) in said
    assert "by another process. End that one first" in said
    for step in range(6, 20):
        append(first, row_of(step))
    first.close(complete=True)
    run = open_run(first.path)
    assert run.gram()[:, 0, 0, 0].tolist() == [squared(step) for step in range(20)]
    assert validate(first.path).whole


def test_overwriting_looks_again_at_the_first_step(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(2))
    late = RunWriter(path, PARAMETERS, overwrite=True)
    with locked_by_another_process(path):
        with pytest.raises(RunFileError, match=r"one writer.*by another process"):
            append(late, row_of(0))
        assert len(open_run(path).steps) == 2
    late.close(complete=True)
    assert len(open_run(path).steps) == 2


def test_overwriting_replaces_no_file_that_came_to_stand_there_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    late = RunWriter(path, PARAMETERS, overwrite=True)
    path.write_text("not a run")
    with pytest.raises(FileExistsError, match="Found another kind of file, with 9 bytes, at"):
        append(late, row_of(0))
    late.close(complete=False)
    assert path.read_text() == "not a run"
    path.unlink()
    assert len(open_run(recorded(path, plain_rows(2), overwrite=True)).steps) == 2


# A file that is no longer there.


@pytest.mark.parametrize("then", ["append", "keep", "close"])
@pytest.mark.parametrize("instead", ["nothing", "another file", "no folder"])
@pytest.mark.parametrize("written", [3, 4])  # with and without room for a further row
def test_a_file_that_vanished_is_noticed_at_once(
    small_capacity: None, tmp_path: Path, written: int, instead: str, then: str
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    path = folder / "a.h5"
    recording = RunWriter(path, PARAMETERS)
    for row in plain_rows(written):
        append(recording, row)
    if instead == "no folder":
        shutil.rmtree(folder)
    else:
        path.unlink()
    if instead == "another file":
        path.write_text("mine")
    with pytest.raises(RunFileError, match=r"no longer there, .*a\.h5'\. Of the .* rows") as caught:
        {
            "append": lambda: append(recording, row_of(written)),
            "keep": lambda: recording.keep("table", {"value": np.zeros(1)}),
            "close": lambda: recording.close(complete=True),
        }[then]()
    assert "whole" not in str(caught.value)
    left = {"nothing": [], "another file": [path], "no folder": []}[instead]
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == left
    assert not left or path.read_text() == "mine"


# Who may not write.


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of everyone's, and a process without the rights of root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder
        finally:
            if root:
                os.setresuid(0, 0, 0)
            folder.chmod(0o777)


on_unix = pytest.mark.skipif(not hasattr(os, "setresuid"), reason="has other rights")


@on_unix
@pytest.mark.parametrize("drop_after", [None, 0, -1])
def test_a_file_that_may_not_be_written_is_named_and_left(
    as_nobody: Path, drop_after: int | None
) -> None:
    path = recorded(as_nobody / "a.h5", plain_rows(3))
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(RunFileError, match=r"a\.h5` should be writable .*Permission denied.*whole"):
        RunWriter(path, PARAMETERS, resume=True, drop_after=drop_after)
    assert path.read_bytes() == before
    assert open_run(path).gram().shape[0] == 3
    path.chmod(0o644)
    recorded(path, plain_rows(2, first=3), resume=True)
    assert open_run(path).steps.tolist() == list(range(5))


@on_unix
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_may_not_be_written_is_named(as_nobody: Path, how: dict[str, bool]) -> None:
    folder = as_nobody / "runs"
    folder.mkdir(mode=0o555)
    with pytest.raises(PermissionError, match=r"folder .* should be writable\. Found .*runs`"):
        RunWriter(folder / "a.h5", PARAMETERS, **how)


@on_unix
def test_a_folder_that_may_no_longer_be_written_loses_nothing(
    small_capacity: None, as_nobody: Path
) -> None:
    folder = as_nobody / "runs"
    folder.mkdir()
    recording = RunWriter(folder / "a.h5", PARAMETERS)
    append(recording, row_of(0))
    folder.chmod(0o555)
    for step in range(1, 4):
        append(recording, row_of(step))
    with pytest.raises(RunFileError, match=r"step 4\. Found: .*Permission.* are whole, 4 of them"):
        append(recording, row_of(4))
    assert open_run(recording.path).steps.tolist() == [0, 1, 2, 3]
    folder.chmod(0o755)
    recorded(recording.path, plain_rows(2, first=4), resume=True)
    assert open_run(recording.path).steps.tolist() == list(range(6))
    assert [file.name for file in folder.iterdir()] == ["a.h5"]


# A disk that is full.


LIMITED = """
    import resource, sys
    sys.path.insert(0, sys.argv[2])
    from geffect import open_run
    from geffect.store import growing_file
    from tests.utils.runs import PARAMETERS, damage, RunWriter, append, row_of

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    growing_file.FIRST_CAPACITY = 4
    path, steps = sys.argv[1], int(sys.argv[3])
    writing = RunWriter(path, PARAMETERS, overwrite=True)
    for step in range(steps):
        append(writing, row_of(step))
    limit(int(sys.argv[4]))
    for action in sys.argv[5:]:
        try:
            append(writing, row_of(steps)) if action == "append" else writing.close(complete=True)
        except Exception as error:
            print(type(error).__name__, error)
    limit(resource.RLIM_INFINITY)
"""


RESUMED = """
    assert steps == 0 or open_run(path).steps.tolist() == list(range(steps))
    again = RunWriter(path, PARAMETERS, resume=True)
    for step in range(steps, steps + 5):
        append(again, row_of(step))
    again.close(complete=True)
"""


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a file's size")


@on_linux
@pytest.mark.parametrize("limit", [0, 100, 9000])
@pytest.mark.parametrize("steps", [0, 4, 8])
def test_a_full_disk_loses_nothing(tmp_path: Path, steps: int, limit: int) -> None:
    said = on_a_full_disk(tmp_path / "a.h5", steps, limit, "append", "close")
    assert f"should be writable at step {steps}. Found: [Errno 27] File too large." in said
    assert (
        "Nothing of this run was written" if steps == 0 else f"are whole, {steps} of them"
    ) in said


@on_linux
def test_a_full_disk_at_the_close_loses_nothing(tmp_path: Path) -> None:
    said = on_a_full_disk(tmp_path / "a.h5", 6, 100, "close", "close")
    assert "should be writable at step 5." in said


@on_linux
def test_a_full_disk_leaves_the_file_that_was_to_be_overwritten(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    before = path.read_bytes()
    said = in_a_fork(LIMITED, path, Path(__file__).parents[2], 0, 100, "append", "close")
    assert "should be writable at step 0" in said
    assert path.read_bytes() == before


def on_a_full_disk(path: Path, steps: int, limit: int, *actions: str) -> str:
    """What a writer says when room runs out; then room is made, and its file continued."""
    code = dedent(LIMITED) + dedent(RESUMED)
    said = in_a_fork(code, path, Path(__file__).parents[2], steps, limit, *actions)
    run = open_run(path)
    assert run.gram()[:, 0, 0, 0].tolist() == [squared(step) for step in range(steps + 5)]
    assert validate(path).complete
    assert validate(path).whole
    assert [file.name for file in path.parent.iterdir()] == ["a.h5"]
    assert said.startswith(f"RunFileError Run file `{path}` ")
    assert len(said.splitlines()) == 1
    return said


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    path = tiny_disk / "a.h5"
    writing = RunWriter(path, PARAMETERS)
    with pytest.raises(RunFileError, match=r"a\.h5` should be writable.*No space left.*resume"):
        for step in range(100_000):
            append(writing, row_of(step))
    written = writing.count
    writing.close(complete=True)
    assert written >= FIRST_CAPACITY
    assert open_run(path).steps.tolist() == list(range(written))
    assert open_run(path).state == "open"
    assert [file.name for file in tiny_disk.iterdir()] == ["a.h5"]
    path = Path(shutil.move(path, tiny_disk.parent / "b.h5"))  # room was made
    recorded(path, plain_rows(3, first=written), resume=True)
    assert open_run(path).steps.tolist() == list(range(written + 3))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def refused(*_: object) -> None:
    raise PermissionError("links are not supported here")
