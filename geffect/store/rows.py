"""The rows of a dataset, read as they are in the file, and held against their checksums."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checksums
from .bounds import BoundedFile
from .labels import as_texts
from .layout import blank, slabs
from .schema import LATER, ROWS


def read_rows(
    file: BoundedFile, name: str, count: int, shape: tuple[int, ...], entry: tuple[int, ...] = ()
) -> NDArray[Any]:
    """The first `count` rows of a dataset, each of this shape, or one entry of each."""
    dtype, written = ROWS[name], _checksums(file, name, count)
    if written is None and name in LATER and name not in file:
        return np.full((count, *shape), blank(dtype), dtype)
    # Of what a rectifier did, earlier and later versions of geffect have fewer or more numbers.
    wanted = (*shape[:-1], None) if name == "rectification" else shape
    dataset = file.rows(name, dtype, count, wanted)
    shape = dataset.shape[1:]
    found = np.empty((count, *shape[len(entry) :]), dtype)
    for begin, stop in slabs(count, prod(shape) * dtype.itemsize):
        rows = dataset[begin:stop]
        if written is not None:
            _compare(name, rows, written[begin:stop], begin)
        found[begin:stop] = rows[(slice(None), *entry)]
    if name == "stored":
        _check_numbers(found)
    return found


def _checksums(file: BoundedFile, name: str, count: int) -> NDArray[np.uint32] | None:
    """Those of the rows of a dataset; None where it was written without."""
    names = as_texts(file.array("checksummed")) if file.version > 2 else []
    if name not in names and (file.version < 3 or name not in file):
        return None
    dataset = file.rows("checksums", ROWS["checksums"], count, (len(names),))
    sums: NDArray[np.uint32] = dataset[:count, names.index(name)]
    return sums


def _compare(name: str, rows: NDArray[Any], written: NDArray[np.uint32], first: int) -> None:
    (changed,) = np.nonzero(checksums.of_rows(name, rows, first) != written)
    if len(changed):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise checksums.Changed(f"row {first + changed[0]}{more} of `{name}`")


def _check_numbers(stored: NDArray[np.int64]) -> None:
    """Refuse what cannot be the number of a row with gradients: there are no more than rows."""
    most = np.arange(len(stored)).reshape(-1, *[1] * (stored.ndim - 1))
    if ((stored < -1) | (stored > most)).any():
        raise ValueError("the number of a row with gradients that there cannot be, in `stored`")


def is_written(file: BoundedFile, name: str, row: int, shape: tuple[int, ...]) -> bool:
    """Whether a row is there that does not count, with a number in it."""
    dataset = file.rows(name, ROWS[name], row, shape)
    return bool(np.isfinite(dataset[row : row + 1]).any())
