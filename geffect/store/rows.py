"""The rows of a dataset, read as they are in the file, and held against their checksums."""

from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checksums
from .bounds import BoundedFile
from .labels import as_texts
from .layout import blank, slabs
from .schema import KEY_COLUMNS, LATER, ROWS, Array


class Rows:
    """The rows from `first` to `count` of the datasets of an open file, each held against its
    checksum."""

    def __init__(self, file: BoundedFile, count: int, first: int = 0) -> None:
        self.count, self.first = count, first
        self._file = file

    def read(self, name: str, shape: tuple[int, ...], entry: tuple[int, ...] = ()) -> NDArray[Any]:
        """Those of a dataset, each of this shape, or one entry of each."""
        dtype, written, first = ROWS[name], self._checksums(name), self.first
        if written is None and name in LATER and name not in self._file:
            return np.full((self.count - first, *shape), blank(dtype), dtype)
        # Of what a rectifier did, earlier and later versions of geffect have fewer or more numbers.
        wanted = (*shape[:-1], None) if name == "rectification" else shape
        dataset = self._file.rows(name, dtype, self.count, wanted)
        _, *held = dataset.shape or ()
        found = np.empty((self.count - first, *held[len(entry) :]), dtype)
        chosen: tuple[slice | int, ...] = (slice(None), *entry)
        for begin, stop in slabs(len(found), prod(held) * dtype.itemsize):
            into = None if entry else found[begin:stop]
            rows = dataset.rows(first + begin, first + stop, into)
            if written is not None:
                _compare(name, rows, written[begin:stop], first + begin)
            if entry:
                found[begin:stop] = rows[chosen]
        if name == "stored":
            _check_numbers(found, first)
        return found

    def marks(self) -> Array:
        """What tells each row from another in its place, its key in the first columns.

        Those are its checksums; of format 2, which has none, it is the key alone.
        """
        if self._file.version < 3:
            return np.stack([self.read(name, ()) for name in KEY_COLUMNS], axis=1)
        further = [name for name in self._checksummed if name not in KEY_COLUMNS]
        return self.sums[:, [*map(self._checksummed.index, [*KEY_COLUMNS, *further])]]

    def _checksums(self, name: str) -> NDArray[np.uint32] | None:
        """Those of the rows of a dataset; None where it was written without."""
        if name not in self._checksummed and (self._file.version < 3 or name not in self._file):
            return None
        return self.sums[:, self._checksummed.index(name)]

    @cached_property
    def _checksummed(self) -> list[str]:
        return as_texts(self._file.array("checksummed")) if self._file.version > 2 else []

    @cached_property
    def sums(self) -> NDArray[np.uint32]:
        """UInt32[row, dataset], as they were written."""
        width = len(self._checksummed)
        dataset = self._file.rows("checksums", ROWS["checksums"], self.count, (width,))
        return dataset.rows(self.first, self.count)


def _compare(name: str, rows: NDArray[Any], written: NDArray[np.uint32], first: int) -> None:
    (changed,) = np.nonzero(checksums.of_rows(name, rows, first) != written)
    if len(changed):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise checksums.Changed(f"row {first + changed[0]}{more} of `{name}`")


def _check_numbers(stored: NDArray[np.int64], first: int) -> None:
    """Refuse what cannot be the number of a row with gradients: there are no more than rows."""
    most = first + np.arange(len(stored)).reshape(-1, *[1] * (stored.ndim - 1))
    if ((stored < -1) | (stored > most)).any():
        raise ValueError("the number of a row with gradients that there cannot be, in `stored`")


def is_written(file: BoundedFile, name: str, row: int, shape: tuple[int, ...]) -> bool:
    """Whether a row is there that does not count, with a number in it."""
    dataset = file.rows(name, ROWS[name], row, shape)
    there = min(row + 1, len(dataset))
    return bool(np.isfinite(dataset.rows(row, there)).any())
