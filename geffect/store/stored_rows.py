"""The rows of a run that have gradients: where these lie, and how many of them count."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter

from .reader import Run
from .schema import KEY, VERSION, Contents, Row, RunFileError
from .segments import Segments, folder_of
from .shards import Shard, remove_segments, segments_in

log = logging.getLogger("geffect.store.writer")


class StoredRows:
    """What the main process writes of the gradients, and how many segments the run file shows."""

    def __init__(self, path: Path, contents: Contents, parameters: Sequence[Parameter]) -> None:
        self._path = path
        self.segments = Segments(contents, parameters)
        self._shard = Shard(path, self.segments, rank=0)
        self.count = 0
        self.shown = 0

    def resume(self, run: Run) -> NDArray[np.int64] | None:
        """Count the gradients up to the last row that every rank wrote whole.

        Returns what is to stand in `/stored` instead where some were not.
        """
        stored, keys = run.read("stored"), run.keys()
        if run.contents.version < 3 and (stored >= 0).any():
            raise RunFileError(
                f"A run with gradients that is continued should be of format {VERSION}. Found "
                f"format {run.contents.version} in `{self._path}`. Continue it with the geffect "
                "that wrote it, or record into another file."
            )
        numbers = stored.max(axis=1)
        (rows,) = np.nonzero(numbers >= 0)
        if len(rows) and not segments_in(folder_of(self._path)):
            raise RunFileError(
                f"The gradients of `{self._path}` should be in `{folder_of(self._path)}`. Found "
                "none there. Move file and folder together, under one name."
            )
        whole = rows[self.segments.whole(self._path, numbers[rows], keys[rows])]
        self.count = int(numbers[whole].max(initial=-1)) + 1
        self.shown = self.segments.count(self.count)
        torn = rows[rows > whole.max(initial=-1)]
        if not len(torn):
            return None
        log.warning(
            "The gradients of %d rows of %s, from step %d on, were not written by every "
            "process. Of these rows only the rest is continued.",
            len(torn), self._path, keys[torn[0], KEY.index("step")],
        )  # fmt: skip
        stored[torn] = -1
        return stored

    def show_next(self) -> bool:
        """Whether the file has to show further segments, for one more row."""
        count = self.segments.count(self.count + 1)
        if count <= self.shown:
            return False
        self.shown = max(count, 2 * self.shown)
        return True

    def show_own(self) -> bool:
        """Whether the file shows more segments than there are; it has to show those."""
        shown, self.shown = self.shown, self.segments.count(self.count)
        return self.shown < shown

    def write(self, row: Row, number: int) -> list[int]:
        """Write the gradients of a row, if it has some: by source the number, or -1."""
        if row.gradients is not None:
            self._shard.write(number, row)
        present = row.gradients or {}
        return [number if source in present else -1 for source in self.segments.sources]

    def undo(self) -> None:
        """Remove what a first row that could not be written has left."""
        if self.segments.may_replace(self._path, number=0, rank=0):
            remove_segments(folder_of(self._path), (0).__eq__)

    def close(self) -> None:
        """Leave the segments to others."""
        self._shard.close()
