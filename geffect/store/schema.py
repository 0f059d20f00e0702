"""The layout of a run file, said once for the writer and the reader.

    /              attributes: format, format_version, state ("open" until the recorder is closed)
    /labels        names of the datasets that are no rows: the labels, and what else is said once
    /manifest      JSON: versions, what was recorded, how, and the user's own metadata
    /parameters/*  one column a field of `geffect.layers.Parameter`, one row a trainable tensor
    /layers        their layers, in order of first appearance
    /sources       names of the gradients
    /steps/*       one column a field of `STEP_COLUMNS`
    /losses        (row, source) float64; NaN for a source that is no loss
    /gram          (row, parameter, source, source) float64; NaN for a source absent at a step
    /expert_gram   (row, expert, source, source) float64; the experts of each tensor that has
                   several in its first dimension, tensor by tensor
    /stepped       (row, parameter) int8: 1 where the step moves the parameter, 0 where it does not,
                   -1 where that is not known; a file without it is one of an earlier geffect
    /lengths       (row, parameter) float64: the length of the parameter after the step, in the rows
                   of a rectifier; NaN where not known, and not in files of an earlier geffect
    /rectification (row, block, column) float64, with /rectification_blocks; if a rectifier ran
    /weights       (row, weight, statistic) float64, with /weight_names; of implicit weights
    /sketches      (row, source, layer, width) float32, with the JSON of /sketch
    /stored        (row, source) int64: the row of /gradients, or -1; with the JSON of /encoding
    /gradients/<source>/<layer>/<array>  encoded gradients, a view of the segments beside the file
    /tables/<name>/<column>  numbers or texts, kept with the run; with the JSON of /kept: the
                   checksum of each column
    /checksums     (row, dataset) uint32, of the datasets that /checksummed names
    /committed     (4,) int64: how many rows count, 1 if the recorder was closed, the checksum of
                   the labels, and that of these three

Texts have a fixed length, in UTF-8. A list of texts of very different lengths is one text, JSON.
`geffect.store.checksums` says how checksums are taken.

A row is one batch of a step. Its key is (request, step, batch), which grows from row to row.

Rows are written into datasets that are larger than what they hold, and `/committed` after them:
a file that is being written never changes its structure, so a killed writer leaves every row that
was counted. When the rows are used up, a larger copy takes the file's place at once; so does a copy
that shows further segments, or that has a table that is to be kept.

Gradients are too large for that. They lie in segments, `run.gradients/000.rank0.h5` beside
`run.h5`: one file a rank and a bounded number of rows, which never grows.

    /              attributes: format, format_version, encoding
    /keys          (row, 4) int64: 1 if the row is there whole, else 0; request, step and batch
    /checksums     (row, source, layer) uint32, of the arrays below
    /<source>/<layer>/<array>  (row, ...) what the rank holds of the tensors of a layer

Format 2, which is read, has no checksums. Its texts have any length, `/committed` is one number,
and the attribute `state` alone says whether the recorder was closed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geffect.sketch import Sketch

FORMAT = "geffect"
VERSION = 3
READABLE = (2, 3)
STATES = ("open", "complete")

Array = NDArray[Any]

ESTIMATES = "estimates"
"""What the manifest has under `rows` where only their mean is near a Gram matrix, not each row."""

KEY = ("request", "step", "batch")
"""The columns that tell the rows apart."""

KEY_COLUMNS = tuple(f"steps/{name}" for name in KEY)
"""The datasets with them."""

STEP_COLUMNS = {
    "request": np.dtype("<i8"),  # of sequential unlearning; 0 where there is one
    "step": np.dtype("<i8"),
    "batch": np.dtype("<i8"),  # of a step that was measured on several; 0 where there is one
    "epoch": np.dtype("<f8"),
    "lr": np.dtype("<f8"),
    "wall_seconds": np.dtype("<f8"),  # since the recorder was opened
    "n_micro": np.dtype("<i8"),  # batches that were accumulated
    "clip_scale": np.dtype("<f8"),  # by which clipping shortened the gradient; 1 where it did not
    "skipped": np.dtype("<i8"),  # 1 where the optimizer took no step
}

RECTIFICATION_COLUMNS = (
    "fired",
    "coefficient",
    "inner_before",
    "inner_after",
    "norm_before",
    "norm_after",
    "retain_norm",
    "applied_average",
    "applied_fresh",
    "unmet",
    "among",
    "selected",
    "selected_again",
    "selected_either",
)
"""Those of `geffect.gradients.Rectification`. A file may hold fewer: the last came later."""

WEIGHT_STATISTICS = ("mean", "median", "p95", "max")

ROWS: Mapping[str, np.dtype[Any]] = {
    **{f"steps/{name}": dtype for name, dtype in STEP_COLUMNS.items()},
    "losses": np.dtype("<f8"),
    "gram": np.dtype("<f8"),
    "expert_gram": np.dtype("<f8"),
    "stepped": np.dtype("i1"),
    "lengths": np.dtype("<f8"),
    "rectification": np.dtype("<f8"),
    "weights": np.dtype("<f8"),
    "sketches": np.dtype("<f4"),
    "stored": np.dtype("<i8"),
    "checksums": np.dtype("<u4"),
}
"""The datasets that have one entry a row."""

LATER = ("stepped", "lengths")
"""Those that a run may lack: they came later, or are not of every run. Each has a number for each
parameter, which is not known where it is missing."""

AXES = {
    "gram": ("steps/step", "parameters/name", "sources", "sources"),
    "losses": ("steps/step", "sources"),
    "stepped": ("steps/step", "parameters/name"),
    "lengths": ("steps/step", "parameters/name"),
    "rectification": ("steps/step", "rectification_blocks"),
    "weights": ("steps/step", "weight_names"),
    "sketches": ("steps/step", "sources", "layers"),
    "stored": ("steps/step", "sources"),
}
"""What the axes of a dataset are, by the dataset that names their places."""


@dataclass(frozen=True)
class OtherSketch:
    """A sketch of another version than ours, which has no meaning here: it is kept, not read."""

    seed: int
    width: int
    version: int


MARKS = 1 << 53
"""Marks of runs are below, which every reader of JSON can tell apart."""

RELEARNED = "relearned"
"""Of the manifest, where the objective's gradient is not at theta: what `geffect.Relearned` is."""

WAITED = "waited"
"""The table of a run that keeps gradients: for how many `seconds` training waited for the disk,
over how many `rows`, since the run was opened or resumed. Of several processes, that of the first.
"""

STOP = "stop"
"""The table of what stopped a run, with the columns of `geffect.capture.Stop`."""


@dataclass(frozen=True)
class StoredGradients:
    """Which gradients are kept whole, and how.

    `parameters` are places in the parameter table. `ranges` tells for each rank, and for each of
    those parameters, from where to where it holds the flattened tensor; `((0, numel), ...)` in
    one process. `mark` stands in every whole row of the segments, so that those of another run are
    told from them; 1 where the file says none.
    """

    encoding: str
    parameters: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    mark: int = 1


@dataclass(frozen=True)
class Contents:
    """What every row of a run holds. The manifest is that of the first step."""

    sources: tuple[str, ...]
    manifest: Mapping[str, Any] = field(repr=False, compare=False)
    blocks: tuple[str, ...] = ()  # of a rectifier
    weights: tuple[str, ...] = ()  # implicit weights that have statistics
    sketch: Sketch | OtherSketch | None = None
    gradients: StoredGradients | None = None
    version: int = field(default=VERSION, compare=False)  # of the format they are in


Encoded = Mapping[str, NDArray[Any]]
"""A vector in an encoding of `geffect.encodings`: its arrays by name."""


@dataclass(frozen=True)
class Row:
    """What is stored of one step, or of one batch of it.

    `losses` and `gram` are NaN for a source that is absent. `stepped` is Bool[parameter], None
    where it is not known, and so `lengths`, Float64[parameter]. `weights` is an array (weight,
    statistic), `sketches` one (source, layer, width). `gradients`, which few rows have, are given
    by source and layer; their numbers are there when `arrived` has been called.
    """

    step: int
    losses: NDArray[np.float64]
    gram: NDArray[np.float64]
    request: int = 0
    batch: int = 0
    epoch: float = float("nan")
    lr: float = float("nan")
    wall_seconds: float = float("nan")
    n_micro: int = 1
    clip_scale: float = 1.0
    skipped: bool = False
    stepped: NDArray[np.bool_] | None = None
    expert_gram: NDArray[np.float64] | None = None
    lengths: NDArray[np.float64] | None = None
    rectification: NDArray[np.float64] | None = None
    weights: NDArray[np.float64] | None = None
    sketches: NDArray[np.float32] | None = None
    gradients: Mapping[str, Mapping[str, Encoded]] | None = None
    arrived: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells the row from the others of its run."""
        return self.request, self.step, self.batch

    @property
    def nbytes(self) -> int:
        """How much memory its larger arrays hold."""
        encoded = (
            values
            for layers in (self.gradients or {}).values()
            for arrays in layers.values()
            for values in arrays.values()
        )
        sketches = () if self.sketches is None else (self.sketches,)
        return sum(int(values.nbytes) for values in (self.gram, *sketches, *encoded))

    def datasets(self) -> dict[str, Any]:
        """The entries of the datasets of `ROWS` that are the row's own."""
        entries = {f"steps/{name}": getattr(self, name) for name in STEP_COLUMNS}
        own = ("losses", "gram", "expert_gram", "stepped", "lengths")
        further = ("rectification", "weights", "sketches")
        present = {name: getattr(self, name) for name in (*own, *further)}
        return entries | {name: entry for name, entry in present.items() if entry is not None}


class RunFileError(OSError):
    """A run file that cannot be read or written as asked."""


class UnreadableError(RunFileError):
    """A file that the system does not let read now, whatever is in it."""


class ReplacedError(RunFileError):
    """A file that is no longer the run that was opened there."""


NO_DAMAGE = (UnreadableError, ReplacedError)
"""What says nothing of what was written."""


class ChecksumError(RunFileError):
    """A run file that holds something else than what was written: `what` of it.

    One that is not `closed` may be being written at this moment.
    """

    def __init__(self, said: str, what: str, *, closed: bool) -> None:
        super().__init__(said)
        self.what, self.closed = what, closed
