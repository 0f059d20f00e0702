"""How large a run is going to be, before anything of it is written."""

import os
from collections.abc import Sequence
from pathlib import Path

from geffect.layers import Parameter

from .contiguous import Image, written
from .layout import lay_out, row_bytes
from .schema import Contents
from .segments import Segments, folder_of


def projected_bytes(
    parameters: Sequence[Parameter], contents: Contents, rows: int, gradient_rows: int
) -> int:
    """The bytes that a run takes on the disk: its file, and its segments on all ranks.

    `gradient_rows` of its rows have gradients. Tables that are kept with the run come on top, and
    so does a copy of the file, for a moment, when it grows: where `RunWriter` is not told `rows`.

    >>> from geffect.layers import Parameter
    >>> weight = Parameter("w", "layer 0", "deep", 0, "w", (4096, 4096), "float32", ())
    >>> gram = Contents(("objective", "forget", "retain"), manifest={})
    >>> few, many = (projected_bytes([weight], gram, n, gradient_rows=0) for n in (1000, 2000))
    >>> (many - few) // 1000  # a row: 9 inner products, 3 losses, 9 columns, a mark, 12 checksums
    217
    """
    return _of_file(parameters, contents, rows) + _of_segments(parameters, contents, gradient_rows)


def remaining_bytes(
    path: str | os.PathLike[str],
    parameters: Sequence[Parameter],
    contents: Contents,
    rows: int,
    gradient_rows: int,
) -> int:
    """The bytes that have to be free on the disk to continue a run, up to so many rows in all.

    Segments are continued where they are. The file counts whole: with the first new row a copy of
    it, with room for the others, comes to stand beside it, and then in its place.
    """
    folder = folder_of(Path(path))
    there = sum(map(_taken, folder.iterdir())) if folder.is_dir() else 0
    further = _of_segments(parameters, contents, gradient_rows) - there
    return _of_file(parameters, contents, rows) + max(0, further)


def _of_file(parameters: Sequence[Parameter], contents: Contents, rows: int) -> int:
    image = Image()
    with written(image) as file:
        lay_out(file, contents, parameters, count=0, capacity=1)
    return image.size + (rows - 1) * row_bytes(contents, parameters)


def _of_segments(parameters: Sequence[Parameter], contents: Contents, rows: int) -> int:
    if contents.gradients is None:
        return 0
    segments = Segments(contents, parameters)
    structure = sum(segments.image(0, rank).structure for rank in segments.ranks)
    return rows * segments.row_bytes + segments.count(rows) * structure


def _taken(file: Path) -> int:
    """What a file takes on the disk; segments have holes where nothing was written."""
    found = file.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
