"""A run file at its place: one file after another, each with room for more rows than it holds."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geffect.drafts import draft_of
from geffect.layers import Parameter

from .contiguous import Image, Room, written
from .layout import (
    Columns,
    Held,
    entry_shapes,
    fill,
    lay_out,
    row_bytes,
    with_checksums,
)
from .open_file import OpenFile
from .place import check_replaceable, refuse_to_replace
from .reader import Run
from .schema import VERSION, Contents, Row
from .segments import folder_of
from .shards import files_of_others, remove_segments, segments_in
from .stored_rows import StoredRows

log = logging.getLogger("geffect.store.writer")

FIRST_CAPACITY, SPARE_BYTES = 64, 1 << 23
"""A file whose number of rows is not known has room for so many, and then for twice as many, as
long as what is spare takes up to so many bytes; beyond, for a quarter more, or for one row."""


class GrowingFile:
    """The rows that count, and the file with them; what cannot be changed in it waits for the next.

    `planned` is how many rows there are going to be, 0 where that is not known.
    """

    def __init__(
        self, path: Path, parameters: Sequence[Parameter], *, overwrite: bool, planned: int
    ) -> None:
        self.count = 0
        self.contents: Contents | None = None
        self._path = path
        self._parameters = parameters
        self._overwrite = overwrite
        self._planned = planned
        self._capacity = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file: OpenFile | None = None
        self._stored: StoredRows | None = None
        self._tables: dict[str, Columns] = {}
        self._mended: dict[str, NDArray[np.int64]] = {}  # what the next file has in place of ours
        self._dropping = False
        self._outdated = False

    @property
    def is_made(self) -> bool:
        """Whether there is a file of ours."""
        return self._file is not None

    @property
    def gradient_rows(self) -> int:
        """How many rows have gradients."""
        return 0 if self._stored is None else self._stored.count

    @property
    def is_there(self) -> bool:
        """Whether both the file that is ours, and the gradients that it counts, are in place."""
        ours = self._path.exists() if self._file is None else self._file.is_there
        return ours and (not self.gradient_rows or bool(segments_in(folder_of(self._path))))

    def hold(self, contents: Contents) -> None:
        """Begin with what the rows hold."""
        self.contents = replace(contents, version=VERSION)
        self._shapes = entry_shapes(contents, self._parameters)
        if contents.gradients is not None:
            self._stored = StoredRows(self._path, contents, self._parameters)

    def go_on(self, run: Run, *, dropping: bool) -> None:
        """Begin with the rows of a run, `dropping` later ones of its file."""
        self._outdated = run.contents.version < VERSION
        self._dropping = dropping
        # No room is taken to be left: the first row makes some, and until then the file is as it
        # was.
        self.count = self._capacity = len(run.drawn)
        self.hold(run.contents)
        if self._stored is not None and (mended := self._stored.resume(run)) is not None:
            self._mended["stored"] = mended

    def open(self) -> None:
        """Open the file that is gone on with."""
        self._file = OpenFile(self._path)

    def check_replaceable(self) -> None:
        """Refuse to take the place of what is not to be replaced."""
        begun = None if self._stored is None else self._stored.segments
        check_replaceable(self._path, overwrite=self._overwrite, begun=begun)

    def append(self, row: Row) -> None:
        """Write one row and count it."""
        self._make_room(row)
        self._put(row, self.count, self.gradient_rows)
        self.count += 1
        if self._stored is not None:
            self._stored.count += row.gradients is not None

    def amend(self, row: Row) -> None:
        """Write a row in the place of the last one."""
        assert self._file is not None
        self._file.check()
        self._file.count(self.count - 1)  # a kill may cost the row, and tears none
        self._put(row, self.count - 1, self.gradient_rows - 1)

    def keep(self, name: str, columns: Columns) -> None:
        """Note a table, which waits for the next file."""
        self._tables[name] = columns

    def show_tables(self) -> None:
        """Make a file with the tables that wait, where one may be made now."""
        # Rows that are to be dropped stay until there is a new one.
        if self._file is not None and not self._dropping:
            self._replace(capacity=max(self._capacity, 1))

    def settle(self, *, complete: bool) -> None:
        """Give back the unused rows, and all else that waits its place."""
        # No copy where the file is as it should stay: it would take the room of two.
        assert self._file is not None
        spare = len(self._file.rows["steps/step"]) > self.count
        spare |= self._stored is not None and self._stored.show_own()
        if spare or self._tables or self._mended or self._outdated:
            self._replace(self.count, complete=complete)
        else:
            self._file.mark(complete=complete)

    def undo(self) -> None:
        """Remove the file that was made for a first row which could not be written."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            if self._stored is not None:
                self._stored.undo()

    def close(self) -> None:
        """Leave the file to others."""
        for part in (self._stored, self._file):
            if part is not None:
                part.close()

    def _make_room(self, row: Row) -> None:
        """Have a file with room for the row, which shows the segment of its gradients."""
        assert self.contents is not None
        full, first = self.count == self._capacity, self._file is None
        capacity = self._capacity
        if full:
            row_size = row_bytes(self.contents, self._parameters)
            planned = self._planned > self.count
            capacity = self._planned if planned else _larger(self.count, row_size)
        if row.gradients is not None:
            assert self._stored is not None
            full |= self._stored.show_next()
        if full:
            self._replace(capacity)
        if first:
            # Of a run that was there before, or of a first row that was never counted.
            ranks = len(self._stored.segments.ranks) if self._stored else 1
            remove_segments(folder := folder_of(self._path), lambda rank: not 0 < rank < ranks)
            if strange := files_of_others(folder):
                log.warning("Left in `%s`, as not of this run: %s.", folder, ", ".join(strange[:5]))

    def _put(self, row: Row, index: int, number: int) -> None:
        """Write a row, as the one with gradients of that number if it has some, and count it."""
        assert self._file is not None
        self._file.check()
        entries = row.datasets()
        if self._stored is not None:
            entries["stored"] = self._stored.write(row, number)
        entries = with_checksums(entries, self._shapes, index)
        # The row has to be in the file before the number that makes it count.
        self._file.put(index, entries)
        self._file.count(index + 1)

    def _replace(self, capacity: int, *, complete: bool = False) -> None:
        """Put a file with room for `capacity` rows, and with those there are, in its place."""
        assert self.contents is not None
        held: Held = {}
        tables: dict[str, Columns] = self._tables
        if self._file is not None:
            held = self._file.carried(self._shapes, self.count, self._mended)
            tables = self._file.tables() | tables
        image = Image()
        with written(image) as file:
            rooms = lay_out(
                file,
                self.contents,
                self._parameters,
                count=self.count,
                capacity=capacity,
                complete=complete,
                tables=tables,
            )
            if self._stored is not None:
                self._stored.segments.announce(file, self._path, self._stored.shown)
        with draft_of(self._path) as draft:
            _save(draft, image, rooms, held, self.count)
            if self._file is not None:
                self._file.close()
            elif not self._overwrite:
                refuse_to_replace(draft, self._path)
            draft.replace(self._path)
        self._file = None
        self._file = OpenFile(self._path)
        self._capacity = capacity
        self._tables.clear()
        self._mended.clear()
        self._dropping = self._outdated = False


def _larger(count: int, row_size: int) -> int:
    """The capacity of a file with room for more rows than there are."""
    twice, gently = max(FIRST_CAPACITY, count), max(SPARE_BYTES // row_size, count // 4, 1)
    return count + min(twice, gently)


def _save(
    draft: Path,
    image: Image,
    rooms: Mapping[str, Room],
    held: Held,
    count: int,
) -> None:
    """Write the structure, and the first `count` rows of what is held; safe from a power cut."""
    with draft.open("r+b") as stream:
        image.save(stream)
        for name, room in rooms.items():
            fill(room, stream, held.get(name), count)
        stream.flush()
        os.fsync(stream.fileno())
