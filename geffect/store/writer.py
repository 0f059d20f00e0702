"""The one writer of a run file. What it has counted survives a kill at any moment."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from weakref import WeakValueDictionary

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.interrupts import to_the_end
from geffect.layers import Parameter

from .contiguous import OPTIONS, Image, Room
from .drafts import draft_of, remove_drafts
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
from .paths import place_of
from .place import check_place, check_replaceable, refuse_to_replace
from .processes import Home
from .reader import Run, check_whole, open_run
from .schema import VERSION, Contents, Row, RunFileError
from .segments import folder_of
from .shards import files_of_others, remove_segments, segments_in
from .stored_rows import StoredRows
from .tables import check_table

log = logging.getLogger(__name__)

FIRST_CAPACITY, SPARE_BYTES = 64, 1 << 23
"""A file whose number of rows is not known has room for so many, and then for twice as many, as
long as what is spare takes up to so many bytes; beyond, for a quarter more, or for one row."""

# HDF5 locks a file against other processes, not against a second writer in its own.
# Weakly: a writer that nobody has any more writes nothing.
_being_written: "WeakValueDictionary[Path, RunWriter]" = WeakValueDictionary()


class RunWriter:
    """Appends rows to a run file.

    The file appears with its first row. Until then an existing file is untouched, also when it is
    to be overwritten. `begin` says once what every row holds; `keep` adds a table at any time.

    With `resume` and `drop_after=s` the rows of later steps are dropped: a trainer that starts
    again from the checkpoint of step s goes on without a gap or a double. They are gone with the
    first new row, or when the run is closed as complete. So are gradients at the end of the run
    that one of the ranks was killed before it wrote; the rows themselves stay.

    `rows` is how many the run is going to have in all, where that is known: the file then never
    has to grow, which takes the room of two.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parameters: Sequence[Parameter],
        *,
        overwrite: bool = False,
        resume: bool = False,
        drop_after: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.path = place_of(path)
        self.parameters = tuple(parameters)
        self.count = 0
        self.last_step = -1
        self.resumed: Run | None = None
        self._overwrite = overwrite
        self._contents: Contents | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._begun = False
        self._stored: StoredRows | None = None
        self._tables: dict[str, Columns] = {}
        self._file: OpenFile | None = None
        self._planned = rows or 0
        self._capacity = 0
        self._mended: dict[str, NDArray[np.int64]] = {}  # what the next file has in place of ours
        self._unchanged = True
        self._dropping = False
        self._outdated = False
        self._ended = False
        self._home = Home()
        self._last_key: tuple[int, ...] | None = None
        _check_alone(self.path)
        check_place(self.path, overwrite=overwrite, resume=resume)
        if resume and self.path.exists():
            self._continue(open_run(self.path), drop_after)
        _being_written[self.path] = self

    @property
    def gradient_rows(self) -> int:
        """How many rows have gradients."""
        return 0 if self._stored is None else self._stored.count

    def begin(self, contents: Contents) -> None:
        """Say what the rows hold, once, before the first of them.

        Raises a ValueError that names what differs from the file that is continued.
        """
        self.check_open()
        self._begun = True
        if self._contents is None:
            self._hold(contents)
            return
        there = self._contents
        differing = [
            f"{field.name} {getattr(contents, field.name)!r} instead of "
            f"{getattr(there, field.name)!r}"
            for field in fields(Contents)
            if field.compare and getattr(contents, field.name) != getattr(there, field.name)
        ]
        if differing:
            self._begun = False
            raise ValueError(
                f"What is recorded should be what the run in `{self.path}` holds. Found "
                f"{'; '.join(differing)}. Record the same, or into another file."
            )

    def append(self, row: Row) -> None:
        """Write one row and count it; a second one of its step takes its place."""
        self.check_open()
        if row.key == self._last_key:  # of whoever was interrupted before they knew of it
            self.amend(row)
            return
        if not self._begun:
            raise RuntimeError(
                "`begin` should be called before the first `append`. Found no call. Say first what "
                "the rows hold."
            )
        if self._file is None:
            begun = None if self._stored is None else self._stored.segments
            check_replaceable(self.path, overwrite=self._overwrite, begun=begun)
        with self._failing(row.step):
            self._make_room(row)
            self._put(row, self.count, self.gradient_rows)
            self.count += 1
            if self._stored is not None:
                self._stored.count += row.gradients is not None
            self.last_step, self._last_key = row.step, row.key
            self._unchanged = False

    def amend(self, row: Row) -> None:
        """Write a row in the place of the last one, about which more is known now."""
        self.check_open()
        assert self._file is not None
        with self._failing(row.step):
            self._file.check()
            self._file.count(self.count - 1)  # a kill may cost the row, and tears none
            self._put(row, self.count - 1, self.gradient_rows - 1)

    def keep(self, name: str, columns: Columns) -> None:
        """Keep a table with the run, in the place of one of the same name.

        Columns are arrays of numbers or lists of texts, all equally long. Before the first row, and
        while rows are to be dropped, the table waits for that row.
        """
        self.check_open()
        check_table(name, columns)
        self._tables[name] = columns
        # Rows that are to be dropped stay until there is a new one.
        if self._file is not None and not self._dropping:
            with self._failing(self.last_step):
                self._replace(capacity=max(self._capacity, 1))

    def check_open(self) -> None:
        """Refuse to go on after the end: a file that is left must not be made anew."""
        self._home.check(self.path)
        if self._ended:
            raise RunFileError(
                f"The recorder of `{self.path}` should be open. Found it closed, or failed at an "
                "earlier step. Make another one, with resume=True to continue the file."
            )

    def close(self, *, complete: bool) -> None:
        """Give back the unused rows. A file that is not complete stays marked as open."""
        if self._ended or not self._home.is_here:
            return
        if self._file is not None and (complete or not self._unchanged):
            with self._failing(self.last_step):
                self._settle(complete=complete)
        self._let_go()

    def _continue(self, run: Run, drop_after: int | None) -> None:
        _check_parameters(self.parameters, run)
        check_whole(run)
        self._outdated = run.contents.version < VERSION
        if drop_after is not None:
            whole, run = run, run.until(drop_after)
            self._dropping = len(run.drawn) < len(whole.drawn)
        self.resumed = run
        self.count = len(run.drawn)
        self.last_step = int(run.steps[-1]) if self.count else -1
        # No room is taken to be left: the first row makes some, and until then the file is as it
        # was.
        self._capacity = self.count
        self._hold(run.contents)
        if self._stored is not None and (mended := self._stored.resume(run)) is not None:
            self._mended["stored"] = mended
        with self._failing(self.last_step):
            self._file = OpenFile(self.path)
        remove_drafts(self.path)

    def _hold(self, contents: Contents) -> None:
        self._contents = replace(contents, version=VERSION)
        self._shapes = entry_shapes(contents, self.parameters)
        if contents.gradients is not None:
            self._stored = StoredRows(self.path, contents, self.parameters)

    def _make_room(self, row: Row) -> None:
        """Have a file with room for the row, which shows the segment of its gradients."""
        assert self._contents is not None
        full, first = self.count == self._capacity, self._file is None
        capacity = self._capacity
        if full:
            row_size = row_bytes(self._contents, self.parameters)
            planned = self._planned > self.count
            capacity = self._planned if planned else _larger(self.count, row_size)
        if row.gradients is not None:
            assert self._stored is not None
            full |= self._stored.show_next()
        if full:
            self._replace(capacity)
        if first:
            remove_drafts(self.path)
            # Of a run that was there before, or of a first row that was never counted.
            ranks = len(self._stored.segments.ranks) if self._stored else 1
            remove_segments(folder := folder_of(self.path), lambda rank: not 0 < rank < ranks)
            if strange := files_of_others(folder):
                log.warning("Left in `%s`, as not of this run: %s.", folder, ", ".join(strange[:5]))

    def _put(self, row: Row, place: int, number: int) -> None:
        """Write a row, as the one with gradients of that number if it has some, and count it."""
        assert self._file is not None
        self._file.check()
        entries = row.datasets()
        if self._stored is not None:
            entries["stored"] = self._stored.write(row, number)
        entries = with_checksums(entries, self._shapes, place)
        # The row has to be in the file before the number that makes it count.
        self._file.put(place, entries)
        self._file.count(place + 1)

    def _settle(self, *, complete: bool) -> None:
        # No copy where the file is as it should stay: it would take the room of two.
        assert self._file is not None
        spare = len(self._file.rows["steps/step"]) > self.count
        spare |= self._stored is not None and self._stored.show_own()
        if spare or self._tables or self._mended or self._outdated:
            self._replace(self.count, complete=complete)
        else:
            self._file.mark(complete=complete)

    def _replace(self, capacity: int, *, complete: bool = False) -> None:
        """Put a file with room for `capacity` rows, and with those there are, in its place."""
        assert self._contents is not None
        held: Held = {}
        tables: dict[str, Columns] = self._tables
        if self._file is not None:
            held = self._file.carried(self._shapes, self.count, self._mended)
            tables = self._file.tables() | tables
        image = Image()
        with h5py.File(image, "w", **OPTIONS) as file:
            rooms = lay_out(
                file,
                self._contents,
                self.parameters,
                count=self.count,
                capacity=capacity,
                complete=complete,
                tables=tables,
            )
            if self._stored is not None:
                self._stored.segments.announce(file, self.path, self._stored.shown)
        with draft_of(self.path) as draft:
            _save(draft, image, rooms, held, self.count)
            if self._file is not None:
                self._file.close()
            elif not self._overwrite:
                refuse_to_replace(draft, self.path)
            draft.replace(self.path)
        self._file = None
        self._file = OpenFile(self.path)
        self._capacity = capacity
        self._tables.clear()
        self._mended.clear()
        self._dropping = self._outdated = False

    def _undo(self) -> None:
        """Remove the file that was made for a first row which could not be written."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            if self._stored is not None:
                self._stored.undo()

    @property
    def _there(self) -> bool:
        # Both the file that is ours, and the gradients that it counts.
        ours = self.path.exists() if self._file is None else self._file.is_there
        return ours and (not self.gradient_rows or bool(segments_in(folder_of(self.path))))

    def _let_go(self) -> None:
        """Leave the file to others, for good."""
        self._ended = True
        if _being_written.get(self.path) is self:
            _being_written.pop(self.path, None)
        for part in (self._stored, self._file):
            if part is not None:
                part.close()

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Say which file failed, at which step, and what is safe."""
        try:
            yield
        except FileExistsError as error:
            self._let_go()
            raise FileExistsError(
                f"A new run file should not exist yet. Found `{self.path}`, made by another "
                "process since this recorder was opened. Choose another name."
            ) from error
        except RunFileError:
            self._let_go()
            raise
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(Exception):
                self._let_go()
            began = self.count or self.resumed is not None
            safe = _safe(self.count, began=bool(began), there=self._there)
            if self._file is not None and not began and self._there:
                self._undo()
            raise RunFileError(
                f"Run file `{self.path}` should be writable at step {step}. Found: {error}. {safe}"
            ) from error
        except BaseException:  # Ctrl-C: the file is whole, what is known of it may not be
            to_the_end(self._let_go)
            raise


def _check_alone(path: Path) -> None:
    if path in _being_written:
        raise RunFileError(
            f"A run file should have one writer. Found that `{path}` is being written by "
            "another recorder or callback of this process, perhaps of a training that raised. "
            "Call its close() first, then replace the file with overwrite=True or continue it "
            "with resume=True; or choose another name."
        )


def _check_parameters(parameters: Sequence[Parameter], run: Run) -> None:
    """Refuse to continue the run of another model."""
    here = [(p.name, p.shape) for p in parameters]
    there = [(p.name, p.shape) for p in run.layers]
    if here != there:
        differing = sorted({name for name, _ in set(here) ^ set(there)})
        raise ValueError(
            f"The model should have the parameters of the run in `{run.path}`. Found "
            f"{len(differing)} that differ, the first of them {differing[:3]}. Record into "
            "another file, or load the model of that run."
        )
    # What is kept by layer belongs to the layers that the geffect knew which wrote it.
    moved = [p.name for p, q in zip(parameters, run.layers, strict=True) if p.layer != q.layer]
    if moved and (run.contents.sketch is not None or run.contents.gradients is not None):
        raise ValueError(
            f"The layers of the model should be those of the run in `{run.path}`, which keeps "
            f"sketches or gradients of each. Found {len(moved)} parameters in other layers, the "
            f"first of them {moved[:3]}. Record into another file."
        )


def _safe(count: int, *, began: bool, there: bool) -> str:
    """What a writer that failed leaves, and what to do."""
    if not began:
        return (
            "Nothing of this run was written. Mend the cause, such as a full disk, and "
            "record again."
        )
    if there:
        return (
            f"The rows before it are whole, {count} of them. Mend the cause, such as "
            "a full disk, and continue the file with resume=True."
        )
    return (
        f"Of the {count} rows before it something was moved or removed. Put file "
        "and folder back and continue with resume=True, or record again."
    )


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
