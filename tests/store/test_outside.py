"""Nothing outside of a run is read or written, whatever its files and their names say."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from geffect.drafts import draft_of
from geffect.store import RunFileError, open_run, validate
from geffect.store.place import check_place
from geffect.store.writer import RunWriter
from tests.utils.runs import PARAMETERS, plain_rows, recorded
from tests.utils.stored_gradients import PARAMETERS as STORED
from tests.utils.stored_gradients import assert_same, contents, decoded, encoded, record, row

on_unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")

SECRET = "/etc/passwd"


def external(file: h5py.File) -> None:
    kept = file["gram"].shape
    del file["gram"]
    file.create_dataset("gram", kept, "<f8", external=[(SECRET, 0, h5py.h5f.UNLIMITED)])


def external_beside(file: h5py.File) -> None:
    file.create_dataset("tables/notes/text", (4,), "u1", external=[(SECRET, 0, 4)])


def linked(file: h5py.File) -> None:
    del file["losses"]
    file["losses"] = h5py.ExternalLink("other.h5", "/losses")


def linked_deep(file: h5py.File) -> None:
    file["a/b/c"] = h5py.ExternalLink(SECRET, "/")


def soft(file: h5py.File) -> None:
    file["again"] = h5py.SoftLink("/gram")


def virtual(source: str, name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((2,), "<f8")
        layout[:] = h5py.VirtualSource(source, "gram", (2,))
        file.create_virtual_dataset(name, layout)

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (external, "numbers in another file at `/gram`"),
        (external_beside, "numbers in another file at `/tables/notes/text`"),
        (linked, "a link to another file at `/losses`"),
        (linked_deep, "a link to another file at `/a/b/c`"),
        (soft, "a soft link at `/again`"),
        (virtual("other.h5", "view"), "a view of `other.h5` at `/view`"),
        (virtual("a.gradients/000.rank0.h5", "view"), "a view of .* at `/view`"),
        (virtual("../a.gradients/000.rank0.h5", "gradients/x"), "at `/gradients/x`"),
        (virtual("/tmp/a.gradients/000.rank0.h5", "gradients/x"), "at `/gradients/x`"),
        (virtual("a.gradients/../../b.h5", "gradients/x"), "at `/gradients/x`"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "",
)
def test_a_file_that_shows_what_lies_elsewhere_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], found: str
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    with h5py.File(path, "r+") as file:
        change(file)
    for use in (open_run, validate, lambda path: RunWriter(path, PARAMETERS, resume=True)):
        with pytest.raises(RunFileError, match=rf"a\.h5`.*{found}"):
            use(path)


def test_a_group_that_holds_itself_is_walked_once(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(3))
    with h5py.File(path, "r+") as file:
        file["tables/loop"] = file["tables"]
    assert len(open_run(path).steps) == 3


def test_a_run_shows_its_own_segments_also_under_another_name(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=3)
    (tmp_path / "a.h5").rename(tmp_path / "b.h5")
    (tmp_path / "a.gradients").rename(tmp_path / "b.gradients")
    assert_same(open_run(tmp_path / "b.h5").gradient("forget", 2), decoded("forget", 2))


# Segments.


def replaced_by(kind: str, place: Path) -> None:
    """The place is taken by something else; what was there is moved away."""
    away = place.with_name("away")
    place.rename(away)
    if kind == "link":
        place.symlink_to(away)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "folder":
        place.mkdir()


@on_unix
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_a_segment_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = record(tmp_path, "full", steps=3).path
    replaced_by(kind, tmp_path / "a.gradients" / "000.rank0.h5")
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should .*No plain file"):
        open_run(path).gradient("forget", 2)
    assert not validate(path).whole


@on_unix
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_a_folder_of_gradients_that_is_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    path = record(tmp_path, "full", steps=3).path
    replaced_by(kind, tmp_path / "a.gradients")
    with pytest.raises(RunFileError, match=r"000\.rank0\.h5` should"):
        open_run(path).gradient("forget", 2)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"a link or a file at .*a\.gradients`"):
            RunWriter(path, STORED, **how)
    assert (tmp_path / "away" / "000.rank0.h5").exists()


@on_unix
def test_a_folder_that_becomes_a_link_is_not_written_into(tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    to = RunWriter(tmp_path / "a.h5", STORED)
    to.begin(contents("full"))
    (tmp_path / "a.gradients").symlink_to(away)
    with pytest.raises(RunFileError, match="in the place of a folder"):
        to.append(row(0, encoded(0, "full")))
    assert not list(away.iterdir())


# What `overwrite` deletes.


def test_overwriting_refuses_gradients_that_the_run_does_not_count(tmp_path: Path) -> None:
    record(tmp_path, "full", steps=3)
    (tmp_path / "a.h5").rename(tmp_path / "a.hdf5")  # whose folder is the same
    plain = recorded(tmp_path / "b.h5", plain_rows(2)).rename(tmp_path / "a.h5")
    for path in (plain, tmp_path / "a.h4"):
        with pytest.raises(FileExistsError, match=r"Found 000\.rank0\.h5 in .*does not count"):
            RunWriter(path, STORED, overwrite=True)
    assert_same(open_run(tmp_path / "a.hdf5").gradient("forget", 2), decoded("forget", 2))
    with pytest.raises(FileExistsError, match=r"Found 009\.rank7\.h5 in"):
        shutil.copy(
            tmp_path / "a.gradients" / "000.rank0.h5", tmp_path / "a.gradients" / "009.rank7.h5"
        )
        RunWriter(tmp_path / "a.hdf5", STORED, overwrite=True)


def test_overwriting_deletes_the_next_segment_only_where_the_run_began_it(tmp_path: Path) -> None:
    path = record(tmp_path, "full", steps=3).path
    next_one = tmp_path / "a.gradients" / "001.rank0.h5"
    next_one.write_text("mine")
    with pytest.raises(FileExistsError, match=r"Found 001\.rank0\.h5 in .*does not count"):
        RunWriter(path, STORED, overwrite=True)
    assert next_one.read_text() == "mine"
    run = open_run(path)
    run.segments().image(1, 0).save(next_one.open("wb"))
    RunWriter(path, STORED, overwrite=True).close(complete=False)


def test_what_is_not_of_the_run_is_left_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = record(tmp_path, "full", steps=3).path
    folder = tmp_path / "a.gradients"
    (folder / "notes.txt").write_text("mine")
    (folder / "001.rank0.h5").symlink_to(folder / "notes.txt")
    to = RunWriter(path, STORED, overwrite=True)
    to.begin(contents("full"))
    to.append(row(0, None))
    to.close(complete=True)
    assert "as not of this run: 001.rank0.h5, notes.txt." in caplog.text
    assert {file.name for file in folder.iterdir()} == {"notes.txt", "001.rank0.h5"}


# Drafts.


def test_a_draft_takes_no_name_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    victim, trap = tmp_path / "victim", tmp_path / f".a.h5.{'0' * 16}.draft"
    victim.write_text("mine")
    trap.symlink_to(victim)
    with pytest.raises(FileExistsError), draft_of(tmp_path / "a.h5"):
        pass
    assert trap.is_symlink()
    assert victim.read_text() == "mine"


def test_a_run_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = recorded(tmp_path / "a.h5", plain_rows(1))
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# Links to runs, and names.


@on_unix
def test_a_run_opened_through_a_link_finds_its_gradients(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    record(tmp_path / "runs", "full", steps=3)
    link = tmp_path / "latest.h5"
    link.symlink_to(tmp_path / "runs" / "a.h5")
    run = open_run(link)
    assert run.name == "latest"
    assert_same(run.gradient("forget", 2), decoded("forget", 2))
    assert validate(link).whole


@pytest.mark.parametrize(
    ("name", "error", "found"),
    [
        ("x.gradients", ValueError, r"should not end in `\.gradients`.*Found `x\.gradients`"),
        ("X.GRADIENTS", ValueError, r"should not end in"),
        ("n" * 240, ValueError, r"at most 23\d bytes.*Found 240"),
        ("ü" * 120, ValueError, r"at most 23\d bytes.*Found 240"),
        ("run.h5/", ValueError, "ends as a folder"),
        ("folder", FileExistsError, "Found a folder"),
        ("folder/", FileExistsError, "Found a folder"),
        ("a\udcff.h5", ValueError, r"as text\. Found '.*a\\udcff\.h5'"),
        ("a\0.h5", ValueError, "null"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_name_that_cannot_be_is_refused_at_the_start(
    tmp_path: Path, name: str, error: type[Exception], found: str, how: dict[str, bool]
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=found):
        RunWriter(f"{tmp_path}/{name}", PARAMETERS, **how)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("use", [open_run, lambda path: RunWriter(path, PARAMETERS)])
def test_a_path_in_bytes_is_named(use: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"Found b'run\.h5', which is bytes\. Pass os\.fsdecode"):
        use(b"run.h5")


@pytest.mark.parametrize("use", [open_run, lambda path: RunWriter(path, PARAMETERS)])
def test_a_home_that_only_a_shell_knows_is_named(use: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"only a shell knows what `~` is.*expanduser"):
        use("~/run.h5")


@on_unix
@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}], ids=str)
def test_a_pipe_is_neither_replaced_nor_waited_for(tmp_path: Path, how: dict[str, bool]) -> None:
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(FileExistsError, match="Found a pipe or a device"):
        RunWriter(tmp_path / "a.h5", PARAMETERS, **how)
    with pytest.raises(FileNotFoundError, match="Found a pipe or a device"):
        open_run(tmp_path / "a.h5")


@on_unix
def test_a_loop_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.h5").symlink_to(tmp_path / "b.h5")
    (tmp_path / "b.h5").symlink_to(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="should be that of a file"):
        open_run(tmp_path / "a.h5")


# File systems.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without_locks(*_: object, **__: object) -> None:
        raise OSError(number, "unable to lock file")

    monkeypatch.setattr(h5py, "File", without_locks)
    with pytest.raises(RunFileError, match=r"lock files.*Set HDF5_USE_FILE_LOCKING=FALSE"):
        check_place(tmp_path / "a.h5", overwrite=False, resume=False)
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_file_system_lacks_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(path: Path, *_: object) -> int:
        raise OSError(errno.EILSEQ, "Invalid or incomplete multibyte or wide character", str(path))

    monkeypatch.setattr(os, "open", lacking)
    with pytest.raises(RunFileError, match=r"possible at .*a\.h5`.*Invalid.*another name"):
        check_place(tmp_path / "a.h5", overwrite=False, resume=False)
