"""The layout of a run file, said once for the writer and the reader.

    /              attributes: format, format_version, state ("open" until the recorder is closed)
    /manifest      JSON: versions, what was recorded, how, and the user's own metadata
    /parameters/*  one column a field of `geffect.layers.Parameter`, one row a trainable tensor
    /sources       names of the gradients
    /steps/*       one column a field of `STEP_COLUMNS`, one row a step
    /losses        (step, source) float64; NaN for a source that is no loss
    /gram          (step, parameter, source, source) float64; NaN for a source absent at a step
    /rectification (step, block, column) float64, with /rectification_blocks; if a rectifier ran
    /committed     how many rows count

Rows are written into datasets that are larger than what they hold, and `/committed` after them:
a file that is being written never changes its structure, so a killed writer leaves every step that
was counted. When the rows are used up, a copy twice as large takes the file's place at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "geffect"
VERSION = 1

STEP_COLUMNS = {
    "step": np.dtype("<i8"),
    "request": np.dtype("<i8"),  # of sequential unlearning; 0 where there is one
    "lr": np.dtype("<f8"),
    "wall_seconds": np.dtype("<f8"),  # since the recorder was opened
}

RECTIFICATION_COLUMNS = (
    "fired",
    "coefficient",
    "inner_before",
    "inner_after",
    "norm_before",
    "norm_after",
    "retain_norm",
)

ROWS = {
    **{f"steps/{name}": dtype for name, dtype in STEP_COLUMNS.items()},
    "losses": np.dtype("<f8"),
    "gram": np.dtype("<f8"),
    "rectification": np.dtype("<f8"),
}
"""The datasets that have one entry a step."""


AXES = {
    "gram": ("steps/step", "parameters/name", "sources", "sources"),
    "losses": ("steps/step", "sources"),
}
"""What the axes of a dataset are, by the dataset that names their places."""


@dataclass(frozen=True)
class Row:
    """What is stored of one step."""

    step: int
    request: int
    lr: float
    wall_seconds: float
    losses: NDArray[np.float64]
    gram: NDArray[np.float64]
    rectification: NDArray[np.float64] | None

    def datasets(self) -> dict[str, Any]:
        """The entry of each dataset of `ROWS` that the step has."""
        entries = {f"steps/{name}": getattr(self, name) for name in STEP_COLUMNS}
        entries |= {"losses": self.losses, "gram": self.gram}
        return entries | (
            {} if self.rectification is None else {"rectification": self.rectification}
        )


class RunFileError(OSError):
    """A run file that cannot be read or written as asked."""
