"""How large a run is going to be, before anything of it is written."""

from collections.abc import Sequence
from math import prod

import h5py

from geffect.layers import Parameter

from .contiguous import OPTIONS, Image
from .layout import entry_shapes, keep_tables, lay_out
from .schema import ROWS, Contents
from .segments import Segments


def projected_bytes(
    parameters: Sequence[Parameter], contents: Contents, rows: int, gradient_rows: int
) -> int:
    """The bytes that a run takes on the disk: its file, and its segments on all ranks.

    `gradient_rows` of its rows have gradients. Tables that are kept with the run come on top.

    >>> from geffect.layers import Parameter
    >>> weight = Parameter("w", "layer 0", "deep", 0, "w", (4096, 4096), "float32", ())
    >>> gram = Contents(("objective", "forget", "retain"), manifest={})
    >>> size = projected_bytes([weight], gram, rows=1000, gradient_rows=0)
    >>> size // 1000  # bytes a row: 9 inner products, 3 losses, 9 columns
    183
    """
    row = sum(
        prod(shape) * ROWS[name].itemsize
        for name, shape in entry_shapes(contents, parameters).items()
    )
    image = Image()
    segments = Segments(contents, parameters) if contents.gradients else None
    with h5py.File(image, "w", **OPTIONS) as file:
        lay_out(file, contents, parameters, count=0, capacity=1)
        keep_tables(file, None, {})
    size = image.size + (rows - 1) * row
    if segments is not None:
        structure = [segments.image(0, rank).structure for rank in segments.ranks]
        size += gradient_rows * segments.row_bytes
        size += segments.count(gradient_rows) * sum(structure)
    return size
