"""Run files that are changed by hand, with checksums as if a writer had written them so."""

import json
from pathlib import Path

import h5py
import numpy as np

from geffect.store import checksums


def seal(path: Path, *, without: str = "") -> None:
    """Take all checksums of a file anew; `without` one dataset, which it lacks now."""
    with h5py.File(path, "r+") as file:
        names = [name.decode() for name in file["checksummed"][:]]
        if without:
            names.remove(without)
            _put(file, "checksummed", np.array(names, dtype=file["checksummed"].dtype))
            del file["checksums"]
            shape = (len(file["gram"]), len(names))
            file.create_dataset("checksums", shape, checksums.DTYPE)
        for j, name in enumerate(names):
            file["checksums"][:, j] = checksums.of_rows(name, file[name][:])
        rows, complete, *_ = file["committed"][:].tolist()
        kept = {
            table: {
                column: checksums.of_labels(
                    {f"{table}/{column}": stored(file[f"tables/{table}"], column)}
                )
                for column in columns
            }
            for table, columns in json.loads(file["kept"][()]).items()
        }
        text = json.dumps(kept).encode()
        _put(file, "kept", np.array(text, dtype=h5py.string_dtype("utf-8", len(text))))
        labels = {name.decode(): None for name in file["labels"][:]} | {"labels": None}
        found = checksums.of_labels({name: stored(file, name) for name in labels})
        file["committed"][:] = checksums.record_of(rows, found, complete=complete)


def put_json(path: Path, name: str, described: object) -> None:
    """Put another JSON in the place of a label."""
    with h5py.File(path, "r+") as file:
        text = json.dumps(described).encode()
        _put(file, name, np.array(text, dtype=h5py.string_dtype("utf-8", len(text))))


def stored(group: h5py.Group, name: str) -> np.ndarray:
    """All of a dataset, as it is stored."""
    values = np.empty(group[name].shape, group[name].dtype)
    group[name].read_direct(values)
    return values


def _put(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values
