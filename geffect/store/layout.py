"""A run file laid out: every dataset of the schema, with room for more steps than it holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import h5py
import numpy as np

from geffect.layers import Parameter

from .schema import AXES, FORMAT, ROWS, VERSION, Row


def lay_out(
    file: h5py.File,
    first: Row,
    *,
    parameters: Sequence[Parameter],
    sources: Sequence[str],
    blocks: Sequence[str],
    manifest: Mapping[str, object],
    capacity: int,
) -> None:
    """Fill an empty file with the description of a run and its first step."""
    _say_what_it_is(file, "open")
    file["manifest"] = json.dumps(manifest)
    for name, values in _columns(parameters).items():
        file[f"parameters/{name}"] = values
    file["sources"] = _texts(sources)
    if blocks:
        file["rectification_blocks"] = _texts(blocks)
    for name, entry in first.datasets().items():
        _rows(file, name, capacity, np.shape(entry))[0] = entry
    file["committed"] = np.int64(1)
    _label_axes(file)


def copy_rows(old: h5py.File, new: h5py.File, *, count: int, capacity: int, state: str) -> None:
    """Fill an empty file with the run of another and its first `count` steps."""
    _say_what_it_is(new, state)
    by_step = {name.partition("/")[0] for name in ROWS}
    for name in old:
        if name not in by_step:
            old.copy(name, new, without_attrs=True)
    for name in ROWS:
        if name in old:
            _rows(new, name, capacity, old[name].shape[1:])[:count] = old[name][:count]
    _label_axes(new)


def _say_what_it_is(file: h5py.File, state: str) -> None:
    file.attrs.update(format=FORMAT, format_version=VERSION, state=state)


def _rows(file: h5py.File, name: str, capacity: int, shape: tuple[int, ...]) -> h5py.Dataset:
    empty = np.nan if ROWS[name].kind == "f" else -1
    # Written out, not only declared: the space is then there before the first row needs it.
    return file.create_dataset(name, data=np.full((capacity, *shape), empty, dtype=ROWS[name]))


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
    for scale in {scale for scales in AXES.values() for scale in scales}:
        file[scale].make_scale(scale.split("/")[-1])
    for name, scales in AXES.items():
        for axis, scale in enumerate(scales):
            file[name].dims[axis].attach_scale(file[scale])
