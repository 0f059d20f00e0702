"""Files that are there whole or not at all."""

import errno
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import pytest

from geffect.drafts import check_writable, draft_folder_of, draft_of, write_whole
from tests.utils import forks

on_unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["a.html", "a b\n🙂.html", "-o.html", f"{'x' * 250}.html"])
def test_what_was_there_gives_way_to_all_of_it(tmp_path: Path, name: str) -> None:
    for data, found in (("first ü\udcff", b"first \xc3\xbc\\udcff"), (b"\x00\r\n", b"\x00\r\n")):
        write_whole(tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == found
    assert names(tmp_path) == [name]


def on_a_full_disk(place: Path, more: int) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_whole(place, "x" * more)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "written"


@on_unix
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    assert forks.call(on_a_full_disk, place, 100_000) == f"{place}: {os.strerror(27)}"
    assert names(tmp_path) == []
    place.write_text("mine")
    assert forks.call(on_a_full_disk, place, 100_000) == f"{place}: {os.strerror(27)}"
    assert (place.read_text(), names(tmp_path)) == ("mine", ["page.html"])
    assert forks.call(on_a_full_disk, place, 1000) == "written"
    assert place.read_text() == "x" * 1000


@pytest.mark.parametrize("where", ["fsync", "replace", "open"])
def test_an_interrupt_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "page.html").write_text("mine")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "page.html", "x" * 100_000)
    assert (tmp_path / "page.html").read_text() == "mine"
    assert names(tmp_path) == ["page.html"]


@on_unix
def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for link, aim in (("page.html", "far/page.html"), ("other.html", "far/gone.html")):
        (tmp_path / link).symlink_to(aim)
        write_whole(tmp_path / link, "whole")
        assert (tmp_path / link).is_symlink() and (tmp_path / aim).read_text() == "whole"
    (tmp_path / "round.html").symlink_to("round.html")
    for attempt in (check_writable, lambda path: write_whole(path, "")):
        with pytest.raises(OSError, match=r"symbolic links: '.*round.html'"):
            attempt(tmp_path / "round.html")


@on_unix
def test_what_the_umask_takes_is_taken(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "page.html", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o640


@on_unix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_who_may_read_what_was_there_may_read_it_and_nobody_else(tmp_path: Path, mode: int) -> None:
    (tmp_path / "page.html").touch()
    (tmp_path / "page.html").chmod(mode)
    write_whole(tmp_path / "page.html", "x")
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == mode


@on_unix
@pytest.mark.parametrize("kind", ["named", "descriptor", "link"])
def test_a_pipe_gets_it_and_stays(tmp_path: Path, kind: str) -> None:
    found: list[bytes] = []
    if kind == "named":
        place = tmp_path / "page.html"
        os.mkfifo(place)
        reader = threading.Thread(target=lambda: found.append(place.read_bytes()))
        reader.start()
        check_writable(place)  # without waiting for a reader
        write_whole(place, "x" * 100_000)
        reader.join()
        assert place.is_fifo()
    else:
        ours, theirs = os.pipe()
        place = Path(f"/dev/fd/{theirs}")
        if kind == "link":
            (tmp_path / "page.html").symlink_to(place)
            place = tmp_path / "page.html"
        write_whole(place, "x")
        os.close(theirs)
        with os.fdopen(ours, "rb") as stream:
            found.append(stream.read())
    assert {*found[0]} == {ord("x")} and len(found[0]) == (100_000 if kind == "named" else 1)


def printed(place: Path, out: Path) -> None:
    with out.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
    os.write(1, b"first ")
    check_writable(place)
    write_whole(place, "then ")
    os.write(1, b"last")


@on_unix
@pytest.mark.parametrize("place", ["/dev/stdout", "out.txt"])
def test_what_is_printed_to_gets_it_in_order(tmp_path: Path, place: str) -> None:
    """Also where the standard output is a file, which others go on writing."""
    forks.call(printed, tmp_path / place, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "first then last"
    assert names(tmp_path) == ["out.txt"]


@on_unix
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone/page.html", "No such file"),
        ("file/page.html", "Not a directory"),
        ("folder", "Is a directory"),
        ("socket", "No such device"),
        (f"{'x' * 300}.html", "File name too long"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as heard:
        heard.bind(str(tmp_path / "socket"))
    attempts: list[Callable[[Path], None]] = [lambda path: write_whole(path, "x"), check_writable]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name) and says in str(caught.value)
    assert names(tmp_path) == ["file", "folder", "socket"] and (tmp_path / "socket").is_socket()
    assert names(tmp_path / "folder") == []


@pytest.mark.skipif(sys.platform == "win32" or not os.getuid(), reason="may write everything")
def test_a_file_that_is_kept_from_writing_stays(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    (tmp_path / "page.html").chmod(0o444)
    with pytest.raises(PermissionError, match=r"page\.html"):
        write_whole(tmp_path / "page.html", "x")
    assert (tmp_path / "page.html").read_text() == "mine"


# What a killed process leaves.

Draft = Callable[[Path], AbstractContextManager[Path]]
both = pytest.mark.parametrize("make", [draft_of, draft_folder_of])


def half_made(make: Draft, place: Path, pipe: Connection) -> None:
    with make(place) as draft:
        if draft.is_dir():
            (draft / "weights").write_text("half")
        pipe.send(draft.name)
        signal.pause()


@on_unix
@both
def test_the_next_draft_of_a_place_removes_that_of_the_dead_and_of_no_other(
    tmp_path: Path, make: Draft
) -> None:
    place, strange = tmp_path / "out", [".out.notes.draft", ".outer.12.draft", "out.12.draft"]
    for name in strange:
        (tmp_path / name).touch()
    ours, theirs = forks.context().Pipe(duplex=False)
    process = forks.context().Process(target=half_made, args=(make, place, theirs))
    process.start()
    try:
        left = ours.recv()
        with make(place):
            assert left in names(tmp_path)
        assert names(tmp_path) == sorted([left, *strange])  # it lives
    finally:
        process.kill()
        process.join()
    assert left in names(tmp_path)
    with make(place) as draft:
        assert names(tmp_path) == sorted([draft.name, *strange])


@on_unix
@both
def test_where_there_are_no_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Draft
) -> None:
    def lacking(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", lacking)
    left = tmp_path / f".out.{'0' * 16}.draft"
    left.touch() if make is draft_of else left.mkdir()
    with make(tmp_path / "out") as draft:
        assert names(tmp_path) == sorted([left.name, draft.name])
    assert names(tmp_path) == [left.name]


@on_unix
def test_a_draft_that_is_taken_for_one_of_the_dead_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, seen = fcntl.flock, list[str]()

    def late(descriptor: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            seen.extend(names(tmp_path))
        if len(seen) == 1 and how != fcntl.LOCK_UN:
            (tmp_path / seen[0]).unlink()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.flock", late)
    write_whole(tmp_path / "page.html", "whole")
    assert len(set(seen)) == 2 and names(tmp_path) == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "whole"


@on_unix
@both
def test_what_has_the_name_of_a_draft_and_is_none_stays(tmp_path: Path, make: Draft) -> None:
    """A link is not followed, and a folder is not taken for a file, nor a file for a folder."""
    (tmp_path / "mine").touch()
    (tmp_path / ".out.1.draft").symlink_to("mine")
    other = tmp_path / ".out.2.draft"
    other.mkdir() if make is draft_of else other.touch()
    with make(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.1.draft", ".out.2.draft", "mine"]


@on_unix
def test_a_process_that_was_forked_meanwhile_keeps_no_lock(tmp_path: Path) -> None:
    place = tmp_path / "run.h5"
    reads, writes = os.pipe()
    with draft_of(place) as draft:
        child = os.fork()
        if child == 0:
            os.close(writes)
            os.read(reads, 1)  # until the parent is done
            os._exit(0)
        draft.replace(place)
    try:
        with h5py.File(place, "w") as file:  # which takes the lock of a writer
            file["a"] = 1
    finally:
        os.close(writes)
        os.close(reads)
        os.waitpid(child, 0)
