"""Whether a file still is the run that was opened there: its rows are read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geffect.layers import Parameter

from .bounds import BoundedFile
from .labels import labels_checksum, read_committed, read_labels
from .rows import Rows
from .schema import KEY_COLUMNS, ROWS, Array, Contents, ReplacedError


@dataclass(frozen=True)
class Seen:
    """What of a file tells it from another that takes its place: labels, and the key of each row.

    That may be another run, or the same, resumed from an earlier step and with other steps in these
    rows. Further rows and further tables make no other run.
    """

    path: str
    contents: Contents
    parameters: Sequence[Parameter]
    checksum: int | None  # of the labels: where it is as it was, so are they
    keys: Array

    def check(self, file: BoundedFile) -> None:
        """Refuse the file of another run."""
        if self.checksum is None or labels_checksum(file) != self.checksum:
            self._check(self._is_labelled_alike(file))

    def check_rows(self, file: BoundedFile, rows: Rows) -> None:
        """Refuse the file of another run, or one with other steps in these rows."""
        self.check(file)
        there = len(file.rows(KEY_COLUMNS[0], ROWS[KEY_COLUMNS[0]], 0, ())) >= rows.count
        self._check(there and np.array_equal(rows.marks(), self.keys[rows.first : rows.count]))

    def _is_labelled_alike(self, file: BoundedFile) -> bool:
        labels = read_labels(file)
        read_committed(file, labels)
        there = labels.contents()
        of_rows = [(parameter.name, parameter.shape) for parameter in labels.parameters()]
        return (
            there == self.contents
            and there.manifest == self.contents.manifest
            and of_rows == [(parameter.name, parameter.shape) for parameter in self.parameters]
        )

    def _check(self, same: bool) -> None:
        if not same:
            raise ReplacedError(
                f"`{self.path}` should hold the run that was opened there. Found another one, or "
                "the same with other steps: it was replaced, or resumed from an earlier step. Open "
                "it again."
            )
