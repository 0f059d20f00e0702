"""A run as it stands in its file. Needs neither torch nor the model."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter, placed
from geffect.near import meant
from geffect.sketch import Sketch
from geffect.sources import UPDATE

from .outside import check_self_contained, open_plain
from .paths import place_of
from .schema import (
    FORMAT,
    KEY,
    RECTIFICATION_COLUMNS,
    ROWS,
    STEP_COLUMNS,
    VERSION,
    WEIGHT_STATISTICS,
    Contents,
    OtherSketch,
    RunFileError,
    StoredGradients,
)
from .segments import Segments
from .summary import as_html, as_line, size_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Run:
    """The steps of a run that were committed when it was opened. Arrays are read when asked for.

    A step that was measured on several batches has several rows. Numbers of a step are their mean;
    a source that is absent in one of them is absent.
    """

    path: Path
    name: str
    state: str  # "complete", or "open": being recorded, or ended without being closed
    contents: Contents
    layers: tuple[Parameter, ...]
    steps: NDArray[np.int64]  # each once
    rows: NDArray[np.int64]  # how many each step has
    drawn: NDArray[np.int64]  # which rows of the file those are

    def __repr__(self) -> str:
        return as_line(self.name, self._facts())

    def _repr_html_(self) -> str:
        return as_html(self.name, self._facts())

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the gradients, in the order of the Gram matrix."""
        return self.contents.sources

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Versions, what was recorded, and how."""
        return self.contents.manifest

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
                f"Found `{source}`.{meant(source, self.sources)} {hint}"
            )
        return self.sources.index(source)

    def gram(self) -> Floats:
        """Float64[step, parameter, source, source]; NaN for a source absent at a step."""
        return self._means("gram")

    def expert_gram(self) -> Floats:
        """Float64[step, expert, source, source]: those of the experts of each tensor that has some.

        Tensor by tensor, in the order of `layers`; they add up to that of the tensor. NaN where
        they were not measured.
        """
        self._check(
            any(parameter.experts for parameter in self.layers),
            "tensors of several experts",
            "Single experts of other models are parameters of their own: see `gram`.",
        )
        return self._means("expert_gram")

    def stepped(self) -> NDArray[np.bool_]:
        """Bool[step, parameter], whether the step moves the parameter; True where nobody knows.

        So in all of a file that was written before geffect told the two apart.
        """
        moved: NDArray[np.bool_] = self.read("stepped")[self._starts] != 0
        return moved

    def lengths(self) -> Floats:
        """Float64[step, parameter], |theta| after the step; NaN where it is not known.

        A run has it where a rectifier ran, for what rounding does to a step.
        """
        return self._means("lengths")

    def losses(self) -> dict[str, Floats]:
        """The value of every loss over the steps."""
        values = self._means("losses")
        columns = {name: values[:, i] for i, name in enumerate(self.sources)}
        return {name: column for name, column in columns.items() if not np.isnan(column).all()}

    def column(self, name: str) -> NDArray[Any]:
        """A column of the step table, such as `lr`, `epoch` or `skipped`.

        Whole numbers are those of the first row of a step, others a mean.
        """
        if name not in STEP_COLUMNS:
            raise ValueError(
                f"`name` should be one of {', '.join(STEP_COLUMNS)}. Found `{name}`. Choose one of "
                "those."
            )
        if STEP_COLUMNS[name].kind == "f":
            return self._means(f"steps/{name}")
        rows: NDArray[Any] = self.read(f"steps/{name}")[self._starts]
        return rows

    def rectification(self) -> tuple[tuple[str, ...], dict[str, Floats]]:
        """The blocks of the rectifier, and for each of its numbers an array (step, block).

        NaN for what the version of geffect that wrote the file did not know.
        """
        self._check(
            self.contents.blocks,
            "what a rectifier did",
            "Record with recorder.backward(..., rectifier=rectifier).",
        )
        values = self._means("rectification")
        unknown, held = np.full(values.shape[:-1], np.nan), values.shape[-1]
        numbers = {
            name: values[..., i] if i < held else unknown
            for i, name in enumerate(RECTIFICATION_COLUMNS)
        }
        return self.contents.blocks, numbers

    def weights(self) -> dict[str, dict[str, Floats]]:
        """Mean, median, 95th percentile and maximum of every implicit weight, over the steps."""
        self._check(
            self.contents.weights,
            "implicit weights",
            "Record an objective that has some, such as WGA or NPO.",
        )
        values = self._means("weights")
        return {
            weight: {name: values[:, i, j] for j, name in enumerate(WEIGHT_STATISTICS)}
            for i, weight in enumerate(self.contents.weights)
        }

    def sketch(self, source: str) -> NDArray[np.float32]:
        """Float32[step, layer, width]; NaN where the source is absent.

        Layers are in order of first appearance in `layers`.
        """
        place = self.index(source)
        self._check(self.contents.sketch, "sketches", 'Record with Recorder(..., store="sketch").')
        if isinstance(self.contents.sketch, OtherSketch):
            raise ValueError(
                f"The sketches in `{self.path}` should be of version {Sketch.version}. Found "
                f"{self.contents.sketch}. Read them with the version of geffect that made them; "
                "all else can be read here."
            )
        return self._mean(self.read("sketches", place))

    @property
    def stored_steps(self) -> NDArray[np.int64]:
        """The steps whose gradients are kept whole."""
        if self.contents.gradients is None:
            return self.steps[:0]
        kept = (self.read("stored") >= 0).any(axis=1)
        return self.steps[np.add.reduceat(kept, self._starts) > 0]

    def gradient(self, source: str, step: int) -> list[NDArray[np.float32]]:
        """The gradient at a step, one vector a layer: its stored tensors, flat, one after another.

        Layers are in order of first appearance among the stored parameters. For a step
        with several rows it is the mean over those whose gradients were kept.
        """
        place = self.index(source)
        self._check(
            self.contents.gradients, "gradients", 'Record with Recorder(..., store="bf16").'
        )
        number = self.read("stored", place)
        own = np.repeat(self.steps == step, self.rows) & (number >= 0)
        if not own.any():
            there = np.unique(np.repeat(self.steps, self.rows)[number >= 0]).tolist()
            raise ValueError(
                f"`step` should be one at which the gradient of `{source}` was kept: {there}. "
                f"Found {step}. Choose one of those, or record that step with gradients."
            )
        keys = self.keys()[own]
        latest = keys[:, 0] == keys[-1, 0]  # a step number may come again in a later request
        segments = Segments(self.contents, self.layers)
        found = [
            segments.read(self.path, source, int(row), tuple(key))
            for row, key in zip(number[own][latest], keys[latest].tolist(), strict=True)
        ]
        return [np.mean(parts, axis=0, dtype=np.float32) for parts in zip(*found, strict=True)]

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables that were kept with the run."""
        with opened(self.path) as file:
            return tuple(file["tables"])

    def table(self, name: str) -> dict[str, NDArray[Any]]:
        """The columns of a table that was kept with the run: numbers or texts."""
        if name not in (kept := self.tables):
            raise ValueError(
                f"`{self.path}` should hold a table `{name}`. Found {', '.join(kept) or 'none'}. "
                f"Keep it with recorder.keep_table({name!r}, columns)."
            )
        with opened(self.path) as file:
            columns = file[f"tables/{name}"]
            return {column: _numbers_or_texts(columns[column]) for column in columns}

    def resampled(self, rng: np.random.Generator) -> "Run":
        """The run with as many rows a step, drawn from those of the step with replacement.

        The spread of a score over many draws is its uncertainty for the choice of batches. A run
        with one row a step comes back as it is.
        """
        drawn = rng.integers(np.repeat(self.rows, self.rows))
        return replace(self, drawn=self.drawn[np.repeat(self._starts, self.rows) + drawn])

    def until(self, step: int) -> "Run":
        """The run without the rows of later steps of its last request."""
        requests = self.column("request")
        kept = (requests != requests[-1:]) | (self.steps <= step)
        return replace(
            self,
            steps=self.steps[kept],
            rows=self.rows[kept],
            drawn=self.drawn[np.repeat(kept, self.rows)],
        )

    def keys(self) -> NDArray[np.int64]:
        """Int64[row, 3]: request, step and batch, which tell the rows apart."""
        return np.stack([self.read(f"steps/{name}") for name in KEY], axis=1)

    def read(self, name: str, *entry: int) -> NDArray[Any]:
        """The rows of a dataset as they are in the file, or one entry of each."""
        with opened(self.path) as file:
            rows = _rows(file, name, self.drawn.max(initial=-1) + 1, *entry)
        drawn: NDArray[Any] = rows[self.drawn]
        return drawn

    def _facts(self) -> dict[str, str]:
        """What is said of the run where it is shown."""
        numbers = sum(parameter.numel for parameter in self.layers)
        ends = f", from {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else ""
        return {
            "state": self.state
            if self.state == "complete"
            else "open (its writer has not closed it)",
            "steps": f"{len(self.steps)}{ends}",
            "parameters": f"{len(self.layers)} with {numbers:,} numbers",
            "sources": ", ".join(self.sources),
            "size": size_of(self.path),
            "file": str(self.path),
        }

    @property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.rows) - self.rows

    def _means(self, name: str) -> NDArray[Any]:
        return self._mean(self.read(name))

    def _mean(self, values: NDArray[Any]) -> NDArray[Any]:
        """The mean over the rows of each step."""
        if (self.rows == 1).all():
            return values
        sums = np.add.reduceat(values, self._starts, axis=0)
        means: NDArray[Any] = sums / self.rows.reshape(-1, *[1] * (sums.ndim - 1))
        return means.astype(values.dtype)

    def _check(self, held: object, what: str, advice: str) -> None:
        if not held:
            raise ValueError(f"`{self.path}` should hold {what}. Found a run without any. {advice}")


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a file, also while it is being recorded and after its writer was killed."""
    name, path = Path(path).stem, place_of(path)
    with opened(path) as file:
        check_self_contained(file)
        count = committed(file)
        keys = np.stack([_rows(file, f"steps/{name}", count) for name in ("request", "step")])
        first = np.ones(count, dtype=bool)
        first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        return Run(
            path=path,
            name=name,
            state=str(file.attrs["state"], "ascii"),
            contents=_contents(file),
            layers=_parameters(file["parameters"]),
            steps=keys[1, first],
            rows=np.diff(np.flatnonzero(first), append=count),
            drawn=np.arange(count),
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
    # in another process, is readable up to its last committed row.
    with open_plain(path) as stream:
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
            except (KeyError, TypeError, ValueError) as error:
                raise RunFileError(
                    f"{should} Found one that lacks a part, or holds another in its place: {error}."
                    " Take an earlier copy, or record again."
                ) from error


def _check_format(file: h5py.File, should: str) -> None:
    if file.attrs.get("format") != FORMAT:
        raise RunFileError(
            f"{should} Found an HDF5 file of another kind, with {sorted(file)[:5]}. "
            "Pass a file that a Recorder wrote."
        )
    version = int(file.attrs["format_version"])
    if version != VERSION:
        advice = (
            "Update geffect to read it."
            if version > VERSION
            else "Read it with the geffect that wrote it, or record again."
        )
        raise RunFileError(f"{should} Found format {version}. {advice}")


def _rows(file: h5py.File, name: str, count: int, *entry: int) -> NDArray[Any]:
    """The first rows of a dataset, if it holds what the schema says: numbers, never an object."""
    if name in ("stepped", "lengths") and name not in file:  # which came later than the format
        unknown = np.nan if ROWS[name].kind == "f" else -1
        return np.full((count, len(file["parameters/name"])), unknown, dtype=ROWS[name])
    dataset = file[name]
    if dataset.dtype != ROWS[name]:
        raise TypeError(f"{dataset.dtype} in `{name}`")
    rows: NDArray[Any] = dataset[(slice(count), *entry)]
    return rows


def _contents(file: h5py.File) -> Contents:
    def texts(name: str) -> tuple[str, ...]:
        return tuple(file[name].asstr()[:]) if name in file else ()

    gradients = None
    if "encoding" in file:
        stored = json.loads(file["encoding"].asstr()[()])
        gradients = StoredGradients(
            stored["encoding"],
            tuple(stored["parameters"]),
            tuple(tuple((a, b) for a, b in ranges) for ranges in stored["ranges"]),
        )
    return Contents(
        sources=texts("sources"),
        manifest=json.loads(file["manifest"].asstr()[()]),
        blocks=texts("rectification_blocks"),
        weights=texts("weight_names"),
        sketch=_sketch(json.loads(file["sketch"].asstr()[()])) if "sketch" in file else None,
        gradients=gradients,
    )


def _sketch(described: Mapping[str, int]) -> Sketch | OtherSketch:
    try:
        return Sketch(**described)
    except ValueError:
        return OtherSketch(**described)


def _parameters(table: h5py.Group) -> tuple[Parameter, ...]:
    columns = {}
    for column in fields(Parameter):
        if column.name not in table and column.default is not MISSING:  # it came later
            continue
        values = _numbers_or_texts(table[column.name]).tolist()
        if column.name in ("shape", "tied_to"):
            values = [tuple(json.loads(value)) for value in values]
        columns[column.name] = values
    rows = tuple(
        Parameter(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    )
    return rows if "tower" in columns else placed(rows)


def _numbers_or_texts(column: h5py.Dataset) -> NDArray[Any]:
    if h5py.check_string_dtype(column.dtype):
        return np.array(column.asstr()[:], dtype=np.str_)
    if column.dtype.kind not in "biuf":
        raise TypeError(f"`{column.name}` of {column.dtype}")
    values: NDArray[Any] = column[:]
    return values
