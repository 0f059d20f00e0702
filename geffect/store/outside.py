"""Nothing outside of a run is read: its files are plain files, and hold all that they show."""

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import h5py

_SEGMENT = re.compile(rb"(?!\.)[^/]+\.gradients/\d{3,}\.rank\d+\.h5")

_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}


def open_plain(path: Path) -> BinaryIO:
    """A file opened for reading, which is no link, pipe, device or folder."""
    # Without waiting: `open` of a pipe waits for its other end.
    flags = os.O_RDONLY | sum(
        getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
    )
    try:
        stream = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise _no_file(path)
    return stream


def is_plain(path: Path) -> bool:
    """Whether there is a file of its own, not a link to one."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of its own, not a link to one."""
    return os.path.lexists(path) and stat.S_ISDIR(path.lstat().st_mode)


def check_plain(path: Path) -> None:
    """Refuse what is there, if it is no plain file."""
    if os.path.lexists(path) and not is_plain(path):
        raise _no_file(path)


def check_folder(folder: Path) -> None:
    """Refuse what is there, if it is no folder of its own."""
    if os.path.lexists(folder) and not is_folder(folder):
        raise OSError(errno.ENOTDIR, "A link or a file in the place of a folder", str(folder))


def check_self_contained(file: h5py.File) -> dict[str, Any]:
    """Refuse an HDF5 file that shows what lies elsewhere, but for the segments of its gradients.

    Every object is looked at, and no link is followed. What is refused is a ValueError that says
    where it stands. Returns the objects, each by one of its names.
    """
    seen: set[int] = set()
    objects: dict[str, Any] = {}
    waiting: list[tuple[Any, bytes]] = [(file.id, b"")]
    while waiting:
        group, place = waiting.pop()
        for name, kind, address in _links(group):
            path = place + b"/" + name
            if kind != h5py.h5l.TYPE_HARD:
                raise _points_elsewhere(_LINKS.get(kind, "a link of another kind"), path)
            if address in seen:
                continue
            seen.add(address)
            found = h5py.h5o.open(group, name)
            objects[path[1:].decode(errors="surrogateescape")] = found
            if isinstance(found, h5py.h5g.GroupID):
                waiting.append((found, path))
            elif isinstance(found, h5py.h5d.DatasetID):
                _check_dataset(found, path)
    return objects


def _links(group: Any) -> list[tuple[bytes, int, Any]]:
    """The name, the kind and the address of each member of a group."""
    found: list[tuple[bytes, int, Any]] = []

    def note(name: bytes, link: Any) -> None:
        found.append((name, link.type, link.u))  # now: the next is told in the same object

    group.links.iterate(note, info=True)
    return found


def _check_dataset(dataset: Any, path: bytes) -> None:
    plan = dataset.get_create_plist()
    if plan.get_external_count():
        raise _points_elsewhere("numbers in another file", path)
    if plan.get_layout() != h5py.h5d.VIRTUAL:
        return
    for i in range(plan.get_virtual_count()):
        source = os.fsencode(plan.get_virtual_filename(i))
        if not (path.startswith(b"/gradients/") and _SEGMENT.fullmatch(source)):
            raise _points_elsewhere(f"a view of `{os.fsdecode(source)}`", path)


def _points_elsewhere(what: str, path: bytes) -> ValueError:
    return ValueError(f"{what} at `{path.decode(errors='replace')}`, which is outside of the run")


def _no_file(path: Path) -> OSError:
    return OSError(
        errno.EINVAL, "No plain file, but a link, a pipe, a device or a folder", str(path)
    )
