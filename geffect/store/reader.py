"""A run as it stands in its file. Needs neither torch nor the model."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geffect.sketch import Sketch

from .committed_rows import CommittedRows
from .labels import labels_checksum, read_committed, read_labels
from .layout import checksummed
from .opening import opened, settled
from .paths import place_of
from .rows import Rows
from .schema import (
    KEY_COLUMNS,
    RECTIFICATION_COLUMNS,
    STATES,
    STEP_COLUMNS,
    WEIGHT_STATISTICS,
    OtherSketch,
)
from .seen import Seen
from .summary import as_html, as_line, size_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Run(CommittedRows):
    """The steps of a run that were committed when it was opened. Arrays are read when asked for.

    A step that was measured on several batches has several rows. Numbers of a step are their mean;
    a source that is absent in one of them is absent.
    """

    name: str
    state: str  # "complete", or "open": being recorded, or ended without being closed
    steps: NDArray[np.int64]  # each once
    rows: NDArray[np.int64]  # how many each step has

    def __repr__(self) -> str:
        return as_line(self.name, self._facts())

    def _repr_html_(self) -> str:
        return as_html(self.name, self._facts())

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
        numbers, *columns = self.rows_of(["stored", *KEY_COLUMNS])
        number = numbers[:, place]
        own = np.repeat(self.steps == step, self.rows) & (number >= 0)
        if not own.any():
            there = np.unique(np.repeat(self.steps, self.rows)[number >= 0]).tolist()
            raise ValueError(
                f"`step` should be one at which the gradient of `{source}` was kept: {there}. "
                f"Found {step}. Choose one of those, or record that step with gradients."
            )
        keys = np.stack(columns, axis=1)[own]
        latest = keys[:, 0] == keys[-1, 0]  # a step number may come again in a later request
        segments = self.segments()
        found = [
            segments.read(self.path, source, int(row), tuple(key))
            for row, key in zip(number[own][latest], keys[latest].tolist(), strict=True)
        ]
        return [np.mean(parts, axis=0, dtype=np.float32) for parts in zip(*found, strict=True)]

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

    def latest(self, count: int) -> "Run":
        """The run with its last `count` steps alone; what is read of it is not the whole file."""
        first = max(0, len(self.steps) - count)
        rows = self.rows[first:]
        return replace(
            self, steps=self.steps[first:], rows=rows, drawn=self.drawn[self.rows[:first].sum() :]
        )

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
    place = place_of(path)
    return settled(lambda: _open(place, Path(path).stem))


def _open(path: Path, name: str) -> Run:
    with opened(path) as file:
        file.check_self_contained()
        labels = read_labels(file)
        count, complete = read_committed(file, labels)
        rows = Rows(file, count)
        keys = np.stack([rows.read(name, ()) for name in KEY_COLUMNS[:2]])
        first = np.ones(count, dtype=bool)
        first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        contents, layers = labels.contents(), labels.parameters()
        return Run(
            path=path,
            name=name,
            state=STATES[complete],
            contents=contents,
            layers=layers,
            seen=Seen(str(path), contents, layers, labels_checksum(file), rows.marks()),
            steps=keys[1, first],
            rows=np.diff(np.flatnonzero(first), append=count),
            drawn=np.arange(count),
        )


def check_whole(run: Run) -> None:
    """Read every row and every table, which raises a RunFileError where one has changed."""
    for name in checksummed(run.shapes):
        run.read(name)
    for name in run.tables:
        run.table(name)
