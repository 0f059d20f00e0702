"""The checksums of a run: CRC-32 of the bytes as they are stored, in units of what is read.

Each is taken with the place of what it covers, so that two rows, or two blocks, that changed places
do not pass for each other.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from .schema import Array

DTYPE = np.dtype("<u4")

_LAST = 0xFFFFFFFF
"""A row's index is added to the CRC-32 of the name of its dataset, within as many numbers: two
indices begin with two remainders, which stay apart over the same bytes."""


class Changed(ValueError):
    """What is in a file is not what was written there, or is being written at this moment."""


def of_row(name: str, index: int, entry: Array) -> int:
    """The one of a row of a dataset, at this index of it.

    >>> entry = np.zeros(3)
    >>> of_row("losses", 0, entry) == of_row("losses", 0, entry) != of_row("losses", 1, entry)
    True
    """
    seed = zlib.crc32(name.encode()) + index & _LAST
    return zlib.crc32(np.ascontiguousarray(entry).data, seed)


def of_rows(name: str, values: Array, first: int = 0) -> NDArray[np.uint32]:
    """Those of some rows, which are rows `first` and on of a dataset."""
    seed, width = zlib.crc32(name.encode()) + first, prod(values.shape[1:]) * values.itemsize
    stored = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    sums = (
        zlib.crc32(stored[i * width : (i + 1) * width], seed + i & _LAST)
        for i in range(len(values))
    )
    return np.fromiter(sums, dtype=DTYPE, count=len(values))


def of_labels(labels: Mapping[str, Array]) -> int:
    """The one of datasets that are read whole: their names, types, shapes and bytes.

    >>> a, b = np.array([b"forget"]), np.array([b"retain"])
    >>> of_labels({"x": a, "y": b}) == of_labels({"y": b, "x": a}) != of_labels({"x": b, "y": a})
    True
    """
    found = 0
    for name in sorted(labels):
        values = labels[name]
        described = json.dumps([name, values.dtype.str, values.shape]).encode()
        found = zlib.crc32(values.tobytes(), zlib.crc32(described, found))
    return found


def of_block(source: str, layer: str, key: tuple[int, ...], arrays: Iterable[Array]) -> int:
    """The one of what a rank holds of a layer of a gradient, in the row of this key."""
    found = zlib.crc32(json.dumps([source, layer, *map(int, key)]).encode())
    for values in arrays:
        found = zlib.crc32(np.ascontiguousarray(values).data, found)
    return found


def record_of(rows: int, labels: int, *, complete: bool) -> NDArray[np.int64]:
    """What `/committed` holds: how many rows count, whether the run is complete, the checksum of
    the labels, and that of these three."""
    record = np.array([rows, complete, labels], dtype="<i8")
    return np.append(record, np.int64(zlib.crc32(record.tobytes())))
