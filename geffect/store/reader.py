"""A run as it stands in its file. Needs neither torch nor the model."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter
from geffect.sources import UPDATE

from .schema import FORMAT, RECTIFICATION_COLUMNS, STEP_COLUMNS, VERSION, RunFileError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The steps of a run that were committed when it was opened. Arrays are read when asked for."""

    path: Path
    name: str
    state: str  # "complete", or "open": being recorded, or ended without being closed
    manifest: Mapping[str, Any] = field(repr=False)
    sources: tuple[str, ...]
    layers: tuple[Parameter, ...] = field(repr=False)
    steps: NDArray[np.int64] = field(repr=False)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the user gave to the recorder."""
        metadata: Mapping[str, Any] = self.manifest["metadata"]
        return metadata

    def index(self, source: str) -> int:
        """The place of a source in the Gram matrix."""
        if source not in self.sources:
            hint = (
                "Record with Recorder(..., update=True) to have it."
                if source == UPDATE
                else "Name one of those, or record it as a loss of that name."
            )
            raise ValueError(
                f"`source` should be one of {', '.join(self.sources)} in `{self.path}`. "
                f"Found `{source}`. {hint}"
            )
        return self.sources.index(source)

    def gram(self) -> Floats:
        """Float64[step, parameter, source, source]; NaN for a source absent at a step."""
        return self._read("gram")

    def losses(self) -> dict[str, Floats]:
        """The value of every loss over the steps."""
        values = self._read("losses")
        columns = {name: values[:, i] for i, name in enumerate(self.sources)}
        return {name: column for name, column in columns.items() if not np.isnan(column).all()}

    def column(self, name: str) -> NDArray[Any]:
        """A column of the step table: `lr`, `wall_seconds` or `request`."""
        if name not in STEP_COLUMNS:
            raise ValueError(
                f"`name` should be one of {', '.join(STEP_COLUMNS)}. Found `{name}`. Choose one of "
                "those."
            )
        return self._read(f"steps/{name}")

    def rectification(self) -> tuple[tuple[str, ...], dict[str, Floats]]:
        """The blocks of the rectifier, and for each of its numbers an array (step, block)."""
        with opened(self.path) as file:
            if "rectification" not in file:
                raise ValueError(
                    f"`{self.path}` should hold what a rectifier did. Found a run without one. "
                    "Record with recorder.backward(..., rectifier=rectifier)."
                )
            blocks = tuple(file["rectification_blocks"].asstr()[:])
        values = self._read("rectification")
        return blocks, {name: values[..., i] for i, name in enumerate(RECTIFICATION_COLUMNS)}

    def _read(self, name: str) -> NDArray[Any]:
        with opened(self.path) as file:
            rows: NDArray[Any] = file[name][: len(self.steps)]
            return rows


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a file, also while it is being recorded and after its writer was killed."""
    path = Path(path)
    with opened(path) as file:
        return Run(
            path=path,
            name=path.stem,
            state=file.attrs["state"],
            manifest=json.loads(file["manifest"].asstr()[()]),
            sources=tuple(file["sources"].asstr()[:]),
            layers=_parameters(file["parameters"]),
            steps=file["steps/step"][: committed(file)],
        )


def committed(file: h5py.File) -> int:
    """How many rows count: never more than there are."""
    return min(int(file["committed"][()]), len(file["steps/step"]))


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The run file, checked to be one."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"A run file should exist. Found {found} at `{path}`. Check the path; a recorder makes "
            "its file with the first step."
        )
    should = f"`{path}` should be a run file of geffect, format {VERSION}."
    # Through a stream of our own, which HDF5 does not lock: a file that is being recorded, here or
    # in another process, is readable up to its last committed step.
    with path.open("rb") as stream:
        try:
            file = h5py.File(stream, "r")
        except OSError as error:
            raise RunFileError(
                f"{should} Found a file that is not HDF5, or that is cut off: {error}. "
                "Take an earlier copy, or record again."
            ) from error
        with file:
            try:
                _check_format(file, should)
                yield file
            except KeyError as error:
                raise RunFileError(
                    f"{should} Found one that lacks a part: {error}. Take an earlier copy, or "
                    "record again."
                ) from error


def _check_format(file: h5py.File, should: str) -> None:
    if file.attrs.get("format") != FORMAT:
        raise RunFileError(
            f"{should} Found an HDF5 file of another kind, with {sorted(file)[:5]}. "
            "Pass a file that a Recorder wrote."
        )
    version = int(file.attrs["format_version"])
    if version > VERSION:
        raise RunFileError(f"{should} Found format {version}. Update geffect to read it.")


def _parameters(table: h5py.Group) -> tuple[Parameter, ...]:
    columns = {}
    for column in fields(Parameter):
        stored = table[column.name]
        values = stored.asstr()[:] if h5py.check_string_dtype(stored.dtype) else stored[:].tolist()
        if column.name in ("shape", "tied_to"):
            values = [tuple(json.loads(value)) for value in values]
        columns[column.name] = values
    return tuple(
        Parameter(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    )
