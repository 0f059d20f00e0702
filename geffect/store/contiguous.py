"""HDF5 files: HDF5 writes their structure, in memory, and we write the numbers, on the disk.

HDF5 does not survive a disk that is full; a write of our own does. Nor does it write large arrays
as fast as the disk takes them, or leave room to spare without filling it twice.
"""

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.interrupts import to_the_end

# Files of a later format than v108 cannot be reopened after a killed writer, even when flushed.
# What the upper bound admits, virtual datasets, leaves the format of the file as it is.
OPTIONS = {"libver": ("v108", "v110")}

_PAGE = 4096

_WITH_ITS_GROUPS = h5py.h5p.create(h5py.h5p.LINK_CREATE)
_WITH_ITS_GROUPS.set_create_intermediate_group(True)
_WITH_ITS_GROUPS.set_char_encoding(h5py.h5t.CSET_UTF8)

_IN_ONE_PIECE = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
_IN_ONE_PIECE.set_layout(h5py.h5d.CONTIGUOUS)
_IN_ONE_PIECE.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
_IN_ONE_PIECE.set_fill_time(h5py.h5d.FILL_TIME_NEVER)

Stream = BinaryIO | io.FileIO

Identity = tuple[int, int] | None
"""What tells a file from another one of its name; None where there is no file."""


Answer = TypeVar("Answer")


def _finished(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """A method that HDF5 calls, which would make another error of an interrupt: it waits."""

    @wraps(method)
    def finishing(self: "Image", *arguments: Any) -> Answer:
        place = self._place
        try:
            return method(self, *arguments)
        except BaseException as interrupt:
            # Without its frames, which would keep what HDF5 is to close before the end of Python.
            self._interrupt, self._place = interrupt.with_traceback(None), place
            return method(self, *arguments)

    return finishing


class Image(io.RawIOBase):
    """A file in memory that takes no room for what HDF5 has not written.

    An interrupt while HDF5 works on it is raised at the next use of it.
    """

    _interrupt: BaseException | None = None

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._place = 0
        self._size = 0

    @_finished
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._size)
        return self._place

    @_finished
    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for page, inside, part in self._parts(len(view)):
            stored = self._pages.get(page)
            view[part] = stored[inside] if stored else bytes(part.stop - part.start)
        self._place += len(view)
        return len(view)

    @_finished
    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, inside, part in self._parts(len(view)):
            self._pages.setdefault(page, bytearray(_PAGE))[inside] = view[part]
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    @_finished
    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        return self._size

    # Its own: Python looks no name up in a base while an error is on its way through HDF5, and says
    # that there is none, in the place of that error.
    flush = io.RawIOBase.flush

    def save(self, stream: BinaryIO) -> None:
        """Write what is not zero, and give the stream the size of the file."""
        self._check()
        stream.truncate(self._size)
        for page in sorted(self._pages):
            start = page * _PAGE
            stream.seek(start)
            stream.write(self._pages[page][: self._size - start])

    @property
    def size(self) -> int:
        """How long the file is."""
        self._check()
        return self._size

    @property
    def structure(self) -> int:
        """How much of it HDF5 has written."""
        self._check()
        return _PAGE * len(self._pages)

    def _check(self) -> None:
        if self._interrupt is not None:
            raise self._interrupt

    def _parts(self, count: int) -> Iterable[tuple[int, slice, slice]]:
        done = 0
        while done < count:
            page, start = divmod(self._place + done, _PAGE)
            length = min(_PAGE - start, count - done)
            yield page, slice(start, start + length), slice(done, done + length)
            done += length


@contextmanager
def written(image: Image) -> Iterator[h5py.File]:
    """A new file in memory, which is closed afterwards: what HDF5 has open at the end crashes."""
    file = h5py.File(image, "w", **OPTIONS)
    try:
        yield file
    finally:
        to_the_end(file.close)  # which after an error of HDF5's callbacks takes two times


@dataclass(frozen=True)
class Room:
    """Where the rows of a dataset lie in its file."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> "Room":
        """The place of a dataset that is in one piece."""
        return cls(dataset.id.get_offset(), dataset.shape, dataset.dtype)

    @property
    def row_bytes(self) -> int:
        """How long one row is."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def write(self, stream: Stream, row: int, values: NDArray[Any]) -> None:
        """Write one row, or several, to where they belong."""
        if values.dtype != self.dtype or values.shape not in (
            self.shape[1:],
            (len(values), *self.shape[1:]),
        ):
            raise ValueError(
                f"A row should be an array {self.shape[1:]} of {self.dtype}. Found "
                f"{values.shape} of {values.dtype}. Encode it as it was begun."
            )
        stream.seek(self.start + row * self.row_bytes)
        rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[stream.write(rest) :]


def declare(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any) -> Room:
    """Make a dataset in one piece, with room for its numbers, which are not written."""
    made = _made(file, name, shape, h5py.h5t.py_create(np.dtype(dtype)), _IN_ONE_PIECE)
    return Room(made.get_offset(), shape, np.dtype(dtype))


def store(file: h5py.File, name: str, values: NDArray[Any]) -> None:
    """Make a dataset that holds these numbers, or texts of a fixed length."""
    kind = h5py.h5t.py_create(values.dtype, logical=True)
    # By name, so that no interrupt of the write closes it on its way out.
    made = _made(file, name, values.shape, kind)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)


def _made(file: h5py.File, name: str, shape: tuple[int, ...], kind: Any, plan: Any = None) -> Any:
    # Without the objects that h5py puts around it, which take longer to make than the dataset.
    space = h5py.h5s.create_simple(shape)
    return h5py.h5d.create(file.id, name.encode(), kind, space, plan, _WITH_ITS_GROUPS)


def identity(path: Path) -> Identity:
    """Which file has this name now."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_identity(path: Path, opened: Identity) -> None:
    """Raise an OSError where what is written to an open file would be lost with it."""
    if identity(path) != opened:
        raise FileNotFoundError(
            errno.ENOENT, "The file is no longer there, or another one has its name", str(path)
        )
