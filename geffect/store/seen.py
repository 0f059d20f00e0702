"""Whether a file still is the run that was opened there: its rows are read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from geffect.layers import Parameter

from .bounds import BoundedFile
from .labels import labels_checksum, read_committed, read_labels
from .rows import Rows
from .schema import KEY_COLUMNS, ROWS, Array, Contents, ReplacedError


@dataclass(frozen=True)
class Seen:
    """What of a file tells it from another that takes its place: labels, and the marks of its rows.

    That may be another run, or the same, resumed from an earlier step and with other rows in these
    places. Further rows and tables make no other run, nor does the last row where it is written
    again: a recorder does so when it knows more of its step.
    """

    path: str
    contents: Contents
    parameters: Sequence[Parameter]
    checksum: int | None  # of the labels: where it is as it was, so are they
    marks: Array

    def check(self, file: BoundedFile) -> None:
        """Refuse the file of another run."""
        if self.checksum is None or labels_checksum(file) != self.checksum:
            self._check(self._is_labelled_alike(file))

    def check_rows(self, file: BoundedFile, rows: Rows) -> None:
        """Refuse the file of another run, or one with others in the place of these rows."""
        self.check(file)
        there = len(file.rows(KEY_COLUMNS[0], ROWS[KEY_COLUMNS[0]], 0, ())) >= rows.count
        self._check(there and self._are_marked_alike(rows))

    def _are_marked_alike(self, rows: Rows) -> bool:
        known, found = self.marks[rows.first : rows.count], rows.marks()
        if known.shape != found.shape:
            return False
        alike = known == found
        if rows.count == len(self.marks):
            alike[-1:, len(KEY_COLUMNS) :] = True
        return bool(alike.all())

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
                "the same with other rows: it was replaced, or resumed from an earlier step. Open "
                "it again."
            )
