"""HDF5 files, not believed: no length, no type and no link counts before it is compared.

A damaged file may say that a dataset has 2^40 numbers, or that they lie in another file. Here it is
refused before anything is allocated, followed or converted. Texts of any length, which format 2
has, are never read by HDF5: a zeroed heap of theirs hangs it; see `heap`.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.interrupts import interrupt_behind

from . import heap
from .outside import check_self_contained, open_plain
from .schema import Array, UnreadableError

PACKED = 1100
"""No filter of HDF5 makes what it stores shorter than this part: deflate reaches 1032."""


OF_THE_SYSTEM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""What the system says of a file that may be whole."""


class BoundedDataset:
    """A dataset whose numbers lie in its file, all of them."""

    def __init__(self, held: h5py.h5d.DatasetID) -> None:
        self.id, self.dtype = held, held.dtype
        self.shape: tuple[int, ...] | None = held.shape

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def all(self) -> Array:
        """The whole of it."""
        if self.shape is None:
            raise ValueError("a dataset without a shape, where numbers should be")
        values = np.empty(self.shape, self.dtype)
        if values.size:
            self.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
        return values

    def rows(self, begin: int, stop: int, into: Array | None = None) -> Array:
        """Some of its rows, which there are; `into` has room for them."""
        _, *entry = self.shape or ()
        values = np.empty((stop - begin, *entry), self.dtype) if into is None else into
        if values.size:
            chosen = self.id.get_space()
            chosen.select_hyperslab((begin, *[0] * len(entry)), values.shape)
            self.id.read(h5py.h5s.create_simple(values.shape), chosen, values)
        return values


class BoundedFile:
    """A file that is open for reading. What it raises is a ValueError or one of HDF5's own."""

    def __init__(self, file: h5py.File, stream: BinaryIO, size: int) -> None:
        self._file, self._stream, self._size = file, stream, size
        self._places: dict[str, Any] = {"": file.id}
        self._datasets: dict[str, BoundedDataset] = {}
        self._attributes: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        group, _, last = name.rpartition("/")
        if group and group not in self:
            return False
        held = self._place(group)
        return isinstance(held, h5py.h5g.GroupID) and held.links.exists(last.encode())

    @cached_property
    def version(self) -> int:
        """That of the format; negative where none is said."""
        found = self.attribute("format_version")
        return found if isinstance(found, int) else -1

    def check_self_contained(self) -> None:
        """Refuse a file that shows what lies elsewhere, but for the segments of its gradients."""
        heap.check(self._stream, self._size)
        self._places |= check_self_contained(self._file)

    def names(self, group: str = "/") -> list[str]:
        """The members of a group."""
        return sorted(self._group(group))

    def has_attribute(self, name: str) -> bool:
        """Whether the root has an attribute of this name."""
        return bool(h5py.h5a.exists(self._file.id, name.encode()))

    def attribute(self, name: str) -> Any:
        """A number or a short text of the root; None where there is none, or another one."""
        if name not in self._attributes:
            self._attributes[name] = self._attribute(name)
        return self._attributes[name]

    def dataset(
        self, name: str, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] | None = None
    ) -> BoundedDataset:
        """A dataset whose numbers lie in this file, all of them; of this type and shape."""
        if name not in self._datasets:
            self._datasets[name] = self._dataset(name)
        dataset = self._datasets[name]
        if dtype is not None and dataset.dtype != dtype:
            raise ValueError(f"{dataset.dtype} instead of {dtype} in `{name}`")
        if shape is not None and dataset.shape != shape:
            raise ValueError(f"the shape {dataset.shape} instead of {shape} in `{name}`")
        return dataset

    def rows(
        self, name: str, dtype: np.dtype[Any], count: int, entry: tuple[int | None, ...]
    ) -> BoundedDataset:
        """A dataset of at least `count` rows, each of the shape `entry`; None is any length."""
        dataset = self.dataset(name, dtype)
        held: tuple[int, ...] = dataset.shape or ()
        fits = len(held) == 1 + len(entry) and held[0] >= count
        if not fits or any(b not in (None, a) for a, b in zip(held[1:], entry, strict=True)):
            raise ValueError(f"the shape {held} instead of {(count, *entry)} in `{name}`")
        return dataset

    def array(self, name: str) -> Array:
        """All of a dataset of numbers, or of texts of a fixed length as bytes."""
        dataset = self.dataset(name)
        if dataset.dtype.kind not in "biufS":
            raise ValueError(f"{dataset.dtype} in `{name}`")
        return dataset.all()

    def texts_of_any_length(self, name: str) -> NDArray[np.object_]:
        """All of a dataset of texts in a heap, as format 2 has them."""
        dataset = self.dataset(name)
        kind = dataset.id.get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or not kind.is_variable_str():
            raise ValueError(f"{dataset.dtype} instead of texts in `{name}`")
        if dataset.shape is None or not prod(dataset.shape):
            return np.empty(dataset.shape or 0, dtype=object)
        offset = dataset.id.get_offset()
        if offset is None:
            raise ValueError(f"texts that another program has laid out anew, in `{name}`")
        return heap.texts(
            self._stream, self._size, offset, dataset.shape, base=self._file.userblock_size
        )

    def _group(self, name: str) -> h5py.Group:
        place = self._place(name.strip("/"))
        if not isinstance(place, h5py.h5g.GroupID):
            raise ValueError(f"no group at `{name}`")
        return h5py.Group(place)

    def _place(self, name: str) -> Any:
        if name not in self._places:
            group, _, last = name.rpartition("/")
            self._places[name] = _inside(self._place(group), last.encode())
        return self._places[name]

    def _attribute(self, name: str) -> Any:
        if not self.has_attribute(name):
            return None
        found = h5py.h5a.open(self._file.id, name.encode())
        kind = found.get_type()
        text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if not (text or isinstance(kind, h5py.h5t.TypeIntegerID)):
            return None
        if found.shape != () or kind.get_size() > 64:
            return None
        value = np.empty((), found.dtype)
        found.read(value)
        return bytes(value[()]).decode("ascii") if text else int(value)

    def _dataset(self, name: str) -> BoundedDataset:
        place = self._place(name)
        if not isinstance(place, h5py.h5d.DatasetID):
            raise ValueError(f"no dataset at `{name}`")
        dataset = BoundedDataset(place)
        self._check_room(name, dataset)
        return dataset

    def _check_room(self, name: str, dataset: BoundedDataset) -> None:
        plan, stored = dataset.id.get_create_plist(), dataset.id.get_storage_size()
        layout, size = plan.get_layout(), prod(dataset.shape or ()) * dataset.dtype.itemsize
        if layout == h5py.h5d.VIRTUAL or plan.get_external_count():
            raise ValueError(f"numbers that lie outside of the file, in `{name}`")
        if layout == h5py.h5d.CHUNKED:
            # Another program's copy: as much as the packed bytes may hold.
            chunk = prod(plan.get_chunk()) * dataset.dtype.itemsize
            room = PACKED * min(stored, self._size) if plan.get_nfilters() else stored
            fits = size <= room and chunk <= PACKED * self._size
        else:
            offset = dataset.id.get_offset() or 0
            fits = size <= stored and offset + size <= self._size
        if not fits:
            raise ValueError(f"{size} bytes in `{name}`, for which the file has no room")


def _inside(group: Any, name: bytes) -> Any:
    """A member of a group, which is no link to another place."""
    if not isinstance(group, h5py.h5g.GroupID):
        raise KeyError(f"no `{name.decode(errors='replace')}`")
    try:
        link = group.links.get_info(name)
    except (KeyError, RuntimeError):
        if group.links.exists(name):
            raise
        raise KeyError(f"no `{name.decode(errors='replace')}`") from None
    if link.type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"a link at `{name.decode(errors='replace')}`, where numbers should be")
    return h5py.h5o.open(group, name)


@contextmanager
def read_hdf5(path: Path) -> Iterator[BoundedFile]:
    """A file, through a stream of our own, which HDF5 does not lock: it may be being written.

    An interrupt is raised as what it is, and what the system lacks as an error that says so: none
    of it tells of damage.
    """
    before = sys.exception()
    try:
        with open_plain(path) as stream, h5py.File(stream, "r") as file:
            yield BoundedFile(file, stream, os.fstat(stream.fileno()).st_size)
    except Exception as error:
        if (interrupt := interrupt_behind(error, before)) is not None:
            raise interrupt from None
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in OF_THE_SYSTEM:
            raise UnreadableError(
                f"`{path}` should be readable here and now. Found: {error}. That says nothing of "
                "what is in it: mend the cause, and read it again."
            ) from error
        raise
