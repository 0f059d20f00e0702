"""Drafts: files and folders that are made whole beside the place that they are to take.

A draft is locked while it is made. A process that is killed leaves it without its lock, and whoever
makes the next draft of that place removes it.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

TOKEN = 16
"""How many letters nobody can foresee the name of a draft has."""

LONGER = len(f"..{'x' * TOKEN}.draft")
"""By how many bytes the name of a draft is longer than that of the file."""

NAMED = 16
"""So many characters of the name of an output stand in that of its draft, which fits anywhere."""

_ITSELF = sum(
    getattr(os, name, 0) for name in ("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
)
"""How a draft is opened to be locked: no link is followed, and no pipe waited for."""

_NO_LOCK = OSError, ImportError
"""What is raised where another has the lock, or there are none."""


def draft_of(place: Path) -> AbstractContextManager[Path]:
    """An empty file beside the place, under a name that nobody else has; it is gone afterwards.

    Move it into the place to keep it.
    """
    return _draft(place, _make_file, _unlink)


def draft_folder_of(place: Path) -> AbstractContextManager[Path]:
    """An empty folder likewise, to move to where nothing is."""
    return _draft(place, Path.mkdir, partial(shutil.rmtree, ignore_errors=True))


def remove_left(draft: Path) -> None:
    """Remove the file of a draft whose maker was killed, which nobody locks any more."""
    _remove_left(draft, _unlink)


@contextmanager
def _draft(
    place: Path, make: Callable[[Path], object], remove: Callable[[Path], object]
) -> Iterator[Path]:
    own = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]+\.draft")
    with suppress(OSError):  # the folder may be written, and not be listed
        for name in os.listdir(place.parent):
            if own.fullmatch(name):
                _remove_left(place.with_name(name), remove)
    while True:
        draft = place.with_name(f".{place.name}.{secrets.token_hex(TOKEN // 2)}.draft")
        make(draft)
        with ExitStack() as held:
            held.callback(remove, draft)
            with suppress(*_NO_LOCK):  # then nobody will remove it either
                # Shared: who reads it as soon as it has its place finds no lock of a writer.
                held.enter_context(_locked(draft, alone=False))
            if os.path.lexists(draft):  # nobody took it for one that was left, before the lock
                yield draft
                return


def _remove_left(draft: Path, remove: Callable[[Path], object]) -> None:
    with suppress(*_NO_LOCK), _locked(draft, alone=True):
        remove(draft)


def _unlink(draft: Path) -> None:
    draft.unlink(missing_ok=True)


def _make_file(draft: Path) -> None:
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


@contextmanager
def _locked(draft: Path, *, alone: bool) -> Iterator[None]:
    """A lock of a draft as long as the block runs; one of `_NO_LOCK` where there is none."""
    import fcntl  # not on Windows, where what is open cannot be moved either

    descriptor = os.open(draft, _ITSELF)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            # A process that was forked meanwhile holds the descriptor too, and would keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file that is there whole or not at all: until then, what was there stays.

    - `path`: where it is to be; of a link what it points to. A pipe, a terminal and what this
      process prints to, as /dev/stdout, are written into.
    - `data`: text is written as UTF-8, halves of characters as their codes.

    Raises an OSError that names the path, after a full disk for instance.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "page.html"
    >>> write_whole(place, "<p>first</p>")
    >>> write_whole(place, "<p>second</p>")
    >>> place.read_text(), len(list(place.parent.iterdir()))
    ('<p>second</p>', 1)
    """
    written = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with _naming(path):
        if is_stream(path):
            printing = _printing_to(os.stat(path))
            with open(path if printing is None else os.dup(printing), "wb") as stream:
                stream.write(written)
            return
        with _draft_of_output(path) as (draft, place):
            with draft.open("wb") as stream:
                stream.write(written)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(place)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError of `write_whole` now, where a file cannot be made at its place."""
    with _naming(path):
        if not is_stream(path):
            with _draft_of_output(path):
                pass


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a pipe, a terminal or what this process prints to.

    They hold nothing that could be lost.

    >>> is_stream(os.devnull), is_stream("README.md"), is_stream("nothing.html")
    (True, False, False)
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    kinds = stat.S_ISFIFO(found.st_mode), stat.S_ISCHR(found.st_mode)
    return any(kinds) or _printing_to(found) is not None


def _printing_to(found: os.stat_result) -> int | None:
    """The descriptor through which this process prints into a file; None where it does not."""
    for number in (1, 2):
        with suppress(OSError):  # it is closed
            if os.path.samestat(found, os.fstat(number)):
                return number
    return None


@contextmanager
def _draft_of_output(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """A draft, and the place that it is to take; whoever may read what was there may read it."""
    place = Path(path).resolve()
    there = os.stat(place) if place.exists() else None
    if there is not None:
        _check_replaced(place, there)
    with draft_of(place.with_name(place.name[:NAMED])) as draft:
        if there is not None:
            with suppress(OSError):  # the file system knows no modes
                draft.chmod(stat.S_IMODE(there.st_mode))
        yield draft, place


def _check_replaced(place: Path, there: os.stat_result) -> None:
    """Refuse what no file should take the place of: a folder, a socket, a disk, what is kept."""
    found = None
    if not stat.S_ISREG(there.st_mode):
        found = errno.EISDIR if stat.S_ISDIR(there.st_mode) else errno.ENXIO
    elif not os.access(place, os.W_OK):
        found = errno.EACCES
    if found is not None:
        raise OSError(found, os.strerror(found))


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors name the path that was given, not that of a draft, nor none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
