"""A run file laid out: every dataset of the schema, with room for more rows than it holds."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter, layers_of

from . import checksums
from .contiguous import Room, Stream, declare, store
from .labels import text, texts
from .schema import (
    AXES,
    FORMAT,
    RECTIFICATION_COLUMNS,
    ROWS,
    STATES,
    STEP_COLUMNS,
    VERSION,
    WEIGHT_STATISTICS,
    Array,
    Contents,
)

_SLAB = 1 << 24

Columns = Mapping[str, "NDArray[Any] | Sequence[str]"]

Held = Mapping[str, h5py.Dataset | Array]
"""Datasets of `ROWS` by name."""


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
    return shapes | {"checksums": (len(shapes),)}


def checksummed(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The datasets of such a run that have checksums, in the order of these."""
    return tuple(name for name in shapes if name != "checksums")


def blank(dtype: np.dtype[Any]) -> float:
    """What stands for the numbers that a row does not have."""
    return {"f": np.nan, "i": -1}.get(dtype.kind, 0)


def row_bytes(contents: Contents, parameters: Sequence[Parameter]) -> int:
    """How long a row is in the run file."""
    shapes = entry_shapes(contents, parameters)
    return sum(prod(shape) * ROWS[name].itemsize for name, shape in shapes.items())


def filled(
    old: h5py.Dataset | Array | None, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Rows of `old` from `begin` on, as many as `shape` has, with what stands for the missing.

    So also for the columns that an earlier version of geffect did not write.
    """
    rows = np.full(shape, blank(dtype), dtype=dtype)
    if old is not None and begin < len(old):
        held = old[begin : begin + len(rows)]
        rows[tuple(map(slice, held.shape))] = held
    return rows


def fill(room: Room, stream: Stream, old: h5py.Dataset | Array | None, count: int) -> None:
    """Write the first `count` rows of `old`, and blank ones for the rest of the room."""
    capacity, entry = room.shape[0], room.shape[1:]
    # Written out, not only declared: the space is then there before the first row needs it.
    for begin, stop in slabs(capacity, room.row_bytes, count):
        rows = old if begin < count else None
        room.write(stream, begin, filled(rows, begin, (stop - begin, *entry), room.dtype))


def slabs(count: int, row_bytes: int, cut: int = 0) -> Iterator[tuple[int, int]]:
    """From where to where to go on, a few megabytes at a time, and never across `cut`."""
    rows = max(1, _SLAB // max(1, row_bytes))
    for start, end in ((0, cut), (cut, count)):
        for begin in range(start, end, rows):
            yield begin, min(begin + rows, end)


def carried(
    held: Held,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    changed: Collection[str],
) -> Array:
    """The checksums of the first `count` rows of a file that takes the place of another.

    `held` are the datasets of that one, and `names` those that its checksums are of, in their
    order. These go along, so that damage stays seen. They are taken anew where there were none, of
    what is `changed`, and of rows that have another shape now.
    """
    sums = np.zeros((count, len(shapes) - 1), dtype=checksums.DTYPE)
    for j, name in enumerate(checksummed(shapes)):
        old, shape = held.get(name), shapes[name]
        as_it_was = name in names and name not in changed
        if as_it_was and old is not None and old.shape[1:] == shape:
            sums[:, j] = held["checksums"][:count, names.index(name)]
            continue
        row_bytes = prod(shape) * ROWS[name].itemsize
        for begin, stop in slabs(count, row_bytes):
            rows = filled(old, begin, (stop - begin, *shape), ROWS[name])
            sums[begin:stop, j] = checksums.of_rows(name, rows, begin)
    return sums


def with_checksums(
    entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], index: int
) -> dict[str, Array]:
    """The entries of a row in every dataset, as they are stored, and their checksums."""
    if further := entries.keys() - shapes:
        raise ValueError(
            f"A row should hold what the run was begun with: {', '.join(shapes)}. Found "
            f"{', '.join(sorted(further))} beside it. Begin the run with that."
        )
    stored = {
        name: np.broadcast_to(
            np.asarray(entries.get(name, blank(ROWS[name])), dtype=ROWS[name]), shapes[name]
        )
        for name in checksummed(shapes)
    }
    sums = [checksums.of_row(name, index, entry) for name, entry in stored.items()]
    return stored | {"checksums": np.array(sums, dtype=checksums.DTYPE)}


def lay_out(
    file: h5py.File,
    contents: Contents,
    parameters: Sequence[Parameter],
    *,
    count: int,
    capacity: int,
    complete: bool = False,
    tables: Mapping[str, Columns] = MappingProxyType({}),
) -> dict[str, Room]:
    """Fill an empty file with the structure of a run; its rows go where the answer says."""
    file.attrs.create("format", np.bytes_(FORMAT))
    file.attrs.create("format_version", VERSION)
    # As long in either state, so that it can be changed in place.
    file.attrs.create("state", STATES[complete], dtype=h5py.string_dtype("ascii", len("complete")))
    shapes = entry_shapes(contents, parameters)
    file.create_group("tables")
    kept = _keep(file, tables)
    labels = _labels(contents, parameters) | {
        "kept": text(json.dumps(kept)),
        "checksummed": texts(checksummed(shapes)),
    }
    labels["labels"] = texts(list(labels))
    for name, values in labels.items():
        store(file, name, values)
    record = checksums.record_of(count, checksums.of_labels(labels), complete=complete)
    store(file, "committed", record)
    rooms = {
        name: declare(file, name, (capacity, *shape), ROWS[name]) for name, shape in shapes.items()
    }
    _label_axes(file)
    return rooms


def _keep(file: h5py.File, tables: Mapping[str, Columns]) -> dict[str, dict[str, int]]:
    """Put tables into a file; the checksum of each column."""
    kept: dict[str, dict[str, int]] = {}
    for name, table in tables.items():
        kept[name] = {}
        for column, values in table.items():
            numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
            stored = np.asarray(values) if numbers else texts([str(value) for value in values])
            store(file, f"tables/{name}/{column}", stored)
            kept[name][column] = checksums.of_labels({f"{name}/{column}": stored})
    return kept


def _labels(contents: Contents, parameters: Sequence[Parameter]) -> dict[str, Array]:
    """What is said once of the rows, as it is stored."""
    lists = {
        "layers": layers_of(parameters),
        "sources": contents.sources,
        "rectification_blocks": contents.blocks,
        "weight_names": contents.weights,
    }
    described = {"sketch": contents.sketch, "encoding": contents.gradients}
    return {
        "manifest": text(json.dumps(contents.manifest)),
        **{f"parameters/{name}": values for name, values in _columns(parameters).items()},
        **{name: texts(values) for name, values in lists.items() if values},
        **{name: text(json.dumps(asdict(o))) for name, o in described.items() if o is not None},
    }


def _columns(parameters: Sequence[Parameter]) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for field in fields(Parameter):
        values = [getattr(parameter, field.name) for parameter in parameters]
        whole = all(isinstance(value, int) for value in values)
        # Shapes and further names are lists of any length: JSON keeps them in one column.
        columns[field.name] = (
            np.array(values, dtype="<i8")
            if whole
            else texts([v if isinstance(v, str) else json.dumps(v) for v in values])
        )
    return columns


def _label_axes(file: h5py.File) -> None:
    """Dimension scales, for readers such as xarray that know axes by name."""
    present = {name: scales for name, scales in AXES.items() if name in file}
    labels = {scale for scales in present.values() for scale in scales}
    found = {name: h5py.h5d.open(file.id, name.encode()) for name in labels | set(present)}
    for scale in labels:
        h5py.h5ds.set_scale(found[scale], scale.split("/")[-1].encode())
    for name, scales in present.items():
        for axis, scale in enumerate(scales):
            h5py.h5ds.attach_scale(found[name], found[scale], axis)
