"""Tables that are kept with a run, as they are read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geffect.text import plain

from . import checksums
from .bounds import BoundedFile
from .labels import as_texts, is_name, is_text, read_committed, read_labels
from .layout import Columns


def check_table(name: str, columns: Columns) -> None:
    """Refuse a table that cannot be kept, before anything of it is written."""
    for label in (name, *columns):
        if not is_name(label):
            raise ValueError(
                "The name of a table or of its column should be a word without a slash, NUL or "
                f"halves of characters. Found `{plain(label)}`. Name it otherwise."
            )
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The columns of table `{name}` should be equally long. Found {lengths}. Give every "
            "row a value in each of them."
        )
    for column, values in columns.items():
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            fits = values.dtype.itemsize <= 8  # longer ones are padded with anything
        else:
            fits = all(isinstance(value, str) and is_text(value) for value in values)
        if not fits:
            raise ValueError(
                f"Column `{column}` of table `{name}` should be an array of numbers, or a list of "
                "texts without NUL and without halves of characters. Found "
                f"{type(values).__name__}. Convert it."
            )


def tables_in(file: BoundedFile) -> dict[str, dict[str, int]]:
    """The tables of a file: by name the checksum of each column. Format 2 has none."""
    there = file.names("tables")  # a group that every file has, also without tables
    return dict(sorted(_kept(file).items())) if file.version > 2 else {name: {} for name in there}


def read_table(file: BoundedFile, name: str, written: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The columns of a table, numbers or texts, held against what is `written` of them."""
    group = f"tables/{name}"
    if file.version < 3:
        return {column: _of_any_length(file, f"{group}/{column}") for column in file.names(group)}
    columns = {}
    for column, checksum in sorted(written.items()):
        values = file.array(f"{group}/{column}")
        if checksums.of_labels({f"{name}/{column}": values}) != checksum:
            raise checksums.Changed(f"column `{column}` of the table `{name}`")
        texts = values.dtype.kind == "S"
        columns[column] = np.array(as_texts(values), dtype=np.str_) if texts else values
    return columns


def _kept(file: BoundedFile) -> dict[str, dict[str, int]]:
    """The checksum of each column of each table."""
    labels = read_labels(file)
    read_committed(file, labels)
    return labels.json("kept")


def _of_any_length(file: BoundedFile, name: str) -> NDArray[Any]:
    if file.dataset(name).dtype.kind in "biuf":
        return file.array(name)
    return np.array(as_texts(file.texts_of_any_length(name)), dtype=np.str_)
