"""A run file laid out: every dataset of the schema, with room for more rows than it holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter, layers_of

from .contiguous import Room, Stream, declare
from .schema import (
    AXES,
    FORMAT,
    RECTIFICATION_COLUMNS,
    ROWS,
    STEP_COLUMNS,
    VERSION,
    WEIGHT_STATISTICS,
    Contents,
)

_SLAB = 1 << 24

Columns = Mapping[str, "NDArray[Any] | Sequence[str]"]


def entry_shapes(contents: Contents, parameters: Sequence[Parameter]) -> dict[str, tuple[int, ...]]:
    """The datasets of `ROWS` that such a run has, and the shape that one row has in each."""
    k = len(contents.sources)
    shapes: dict[str, tuple[int, ...]] = {f"steps/{name}": () for name in STEP_COLUMNS}
    shapes |= {"losses": (k,), "gram": (len(parameters), k, k), "stepped": (len(parameters),)}
    if experts := sum(parameter.experts for parameter in parameters):
        shapes["expert_gram"] = (experts, k, k)
    if contents.blocks:
        shapes["lengths"] = (len(parameters),)
        shapes["rectification"] = (len(contents.blocks), len(RECTIFICATION_COLUMNS))
    if contents.weights:
        shapes["weights"] = (len(contents.weights), len(WEIGHT_STATISTICS))
    if contents.sketch:
        shapes["sketches"] = (k, len(layers_of(parameters)), contents.sketch.width)
    if contents.gradients:
        shapes["stored"] = (k,)
    return shapes


def row_bytes(contents: Contents, parameters: Sequence[Parameter]) -> int:
    """How long a row is in the run file."""
    shapes = entry_shapes(contents, parameters)
    return sum(prod(shape) * ROWS[name].itemsize for name, shape in shapes.items())


def fill(room: Room, stream: Stream, old: h5py.Dataset | NDArray[Any] | None, count: int) -> None:
    """Write the first `count` rows of `old`, and NaN or -1 into those that follow.

    So also into columns that an earlier version of geffect did not write.
    """
    capacity, entry = room.shape[0], room.shape[1:]
    rows = max(1, _SLAB // max(1, room.row_bytes))
    empty = np.nan if room.dtype.kind == "f" else -1
    # Written out, not only declared: the space is then there before the first row needs it.
    blank = np.full((min(rows, capacity), *entry), empty, dtype=room.dtype)
    for begin in range(0, capacity, rows):
        slab = blank[: min(rows, capacity - begin)]
        if old is not None and begin < count:
            slab = slab.copy()
            held = old[begin : min(begin + len(slab), count)]
            slab[tuple(map(slice, held.shape))] = held
        room.write(stream, begin, slab)


def lay_out(
    file: h5py.File,
    contents: Contents,
    parameters: Sequence[Parameter],
    *,
    count: int,
    capacity: int,
    state: str = "open",
) -> dict[str, Room]:
    """Fill an empty file with the structure of a run; its rows go where the answer says."""
    file.attrs.update(format=FORMAT, format_version=VERSION)
    # As long in either state, so that it can be changed in place.
    file.attrs.create("state", state, dtype=h5py.string_dtype("ascii", len("complete")))
    file["manifest"] = json.dumps(contents.manifest)
    for name, values in _columns(parameters).items():
        file[f"parameters/{name}"] = values
    labels = {
        "layers": layers_of(parameters),
        "sources": contents.sources,
        "rectification_blocks": contents.blocks,
        "weight_names": contents.weights,
    }
    for name, texts in labels.items():
        if texts:
            file[name] = _texts(texts)
    for name, described in (("sketch", contents.sketch), ("encoding", contents.gradients)):
        if described is not None:
            file[name] = json.dumps(asdict(described))
    file["committed"] = np.int64(count)
    rooms = {
        name: declare(file, name, (capacity, *shape), ROWS[name])
        for name, shape in entry_shapes(contents, parameters).items()
    }
    _label_axes(file)
    return rooms


def keep_tables(file: h5py.File, old: h5py.File | None, tables: Mapping[str, Columns]) -> None:
    """Put tables into a file, beside those of the file whose place it takes."""
    group = file.create_group("tables")
    for name, table in tables.items():
        for column, values in table.items():
            group[f"{name}/{column}"] = values if isinstance(values, np.ndarray) else _texts(values)
    if old is not None:
        for name in old["tables"].keys() - tables.keys():
            old.copy(f"tables/{name}", group)


def _columns(parameters: Sequence[Parameter]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for field in fields(Parameter):
        values = [getattr(parameter, field.name) for parameter in parameters]
        whole = all(isinstance(value, int) for value in values)
        # Shapes and further names are lists of any length: JSON keeps them in one column.
        columns[field.name] = (
            np.array(values, dtype="<i8")
            if whole
            else _texts([v if isinstance(v, str) else json.dumps(v) for v in values])
        )
    return columns


def _texts(values: Sequence[str]) -> Any:
    return np.array(list(values), dtype=h5py.string_dtype())


def _label_axes(file: h5py.File) -> None:
    """Dimension scales, for readers such as xarray that know axes by name."""
    present = {name: scales for name, scales in AXES.items() if name in file}
    for scale in {scale for scales in present.values() for scale in scales}:
        file[scale].make_scale(scale.split("/")[-1])
    for name, scales in present.items():
        for axis, scale in enumerate(scales):
            file[name].dims[axis].attach_scale(file[scale])
