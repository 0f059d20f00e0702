"""The one writer of a run file. What it has counted survives a kill at any moment."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from weakref import WeakValueDictionary

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter

from .contiguous import OPTIONS, Identity, Image, check_identity, identity
from .layout import Columns, fill, keep_tables, lay_out, row_bytes
from .reader import Run, open_run
from .schema import KEY, ROWS, Contents, Row, RunFileError
from .segments import Segments, folder_of
from .shards import Shard, has_segments, remove_segments

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
        # Of a link, what it points to; whatever the working folder.
        self.path = Path(path).resolve()
        self.parameters = tuple(parameters)
        self.count = 0
        self.last_step = -1
        self.resumed: Run | None = None
        self._overwrite = overwrite
        self.gradient_rows = 0
        self._contents: Contents | None = None
        self._begun = False
        self._segments: Segments | None = None
        self._shard: Shard | None = None
        self._announced = 0  # segments that the file shows
        self._tables: dict[str, Columns] = {}
        self._file: h5py.File | None = None
        self._identity: Identity = None
        self._planned = rows or 0
        self._capacity = 0
        self._mended: dict[str, NDArray[np.int64]] = {}  # what the next file has in place of ours
        self._unchanged = True
        self._dropping = False
        self._ended = False
        self._check_place(overwrite, resume)
        if resume and self.path.exists():
            self._continue(open_run(self.path), drop_after)
        _being_written[self.path] = self

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
        """Write one row and count it."""
        self.check_open()
        if not self._begun:
            raise RuntimeError(
                "`begin` should be called before the first `append`. Found no call. Say first what "
                "the rows hold."
            )
        if self._file is None and self._overwrite:
            self._check_free()
        with self._failing(row.step):
            self._make_room(row)
            self._add(row)
        self.count += 1
        self.gradient_rows += row.gradients is not None
        self.last_step = row.step
        self._unchanged = False

    def amend(self, row: Row) -> None:
        """Write a row in the place of the last one, of which more has become known."""
        self.check_open()
        assert self._file is not None
        with self._failing(row.step):
            self._count(self.count - 1)  # a kill may cost the row, and tears none
            self._put(row, self.count - 1, self.gradient_rows - 1)
            self._count(self.count)

    def keep(self, name: str, columns: Columns) -> None:
        """Keep a table with the run, in the place of one of the same name.

        Columns are arrays of numbers or lists of texts, all equally long. Before the first row, and
        while rows are to be dropped, the table waits for that row.
        """
        self.check_open()
        _check_table(name, columns)
        self._tables[name] = columns
        # Rows that are to be dropped stay until there is a new one.
        if self._file is not None and not self._dropping:
            with self._failing(self.last_step):
                self._replace(capacity=max(self._capacity, 1))

    def check_open(self) -> None:
        """Refuse to go on after the end: a file that is left must not be made anew."""
        if self._ended:
            raise RunFileError(
                f"The recorder of `{self.path}` should be open. Found it closed, or failed at an "
                "earlier step. Make another one, with resume=True to continue the file."
            )

    def close(self, *, complete: bool) -> None:
        """Give back the unused rows. A file that is not complete stays marked as open."""
        if self._ended:
            return
        if self._file is not None and (complete or not self._unchanged):
            with self._failing(self.last_step):
                self._settle("complete" if complete else "open")
        self._let_go()

    def _check_place(self, overwrite: bool, resume: bool) -> None:
        if overwrite and resume:
            raise ValueError(
                "`overwrite` and `resume` should not both be True. Found both. "
                "Choose whether the file is replaced or continued."
            )
        folder = self.path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                f"The folder of a run file should exist. Found no folder `{folder}`. Create it."
            )
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                f"The folder of a run file should be writable. Found `{folder}`, which is not. "
                "Choose another folder."
            )
        if self.path in _being_written:
            raise RunFileError(
                f"A run file should have one writer. Found that `{self.path}` is being written by "
                "another recorder or callback of this process, perhaps of a training that raised. "
                "Call its close() first, or choose another name."
            )
        if self.path.exists() and not (overwrite or resume):
            raise FileExistsError(
                f"A new run file should not exist yet. Found `{self.path}`. Choose another name, "
                "continue it with resume=True, or replace it with overwrite=True."
            )
        if has_segments(folder_of(self.path)) and not (overwrite or resume):
            raise FileExistsError(
                "A new run should not find gradients of another one beside it. Found segments in "
                f"`{folder_of(self.path)}`. Choose another name, remove that folder, or pass "
                "overwrite=True."
            )
        self._check_free()

    def _check_free(self) -> None:
        """Refuse a file that another process is writing: it holds the lock of HDF5."""
        try:
            h5py.File(self.path, "r").close()
        except BlockingIOError as error:
            raise self._in_use() from error
        except OSError:
            pass  # There is no file, or one that no recorder is writing.

    def _in_use(self) -> RunFileError:
        return RunFileError(
            f"A run file should have one writer. Found that `{self.path}` is being written, or "
            "kept open, by another process. End that one first, or choose another name."
        )

    def _continue(self, run: Run, drop_after: int | None) -> None:
        here = [(p.name, p.shape) for p in self.parameters]
        there = [(p.name, p.shape) for p in run.layers]
        if here != there:
            differing = sorted({name for name, _ in set(here) ^ set(there)})
            raise ValueError(
                f"The model should have the parameters of the run in `{self.path}`. Found "
                f"{len(differing)} that differ, the first of them {differing[:3]}. Record into "
                "another file, or load the model of that run."
            )
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
        if self._segments is not None:
            self._count_gradients(run, self._segments)
        with self._failing(self.last_step):
            self._file = self._open()
        self._sweep()

    def _count_gradients(self, run: Run, segments: Segments) -> None:
        """Count the gradients up to the last row that every rank wrote whole."""
        stored, keys = run.read("stored"), run.keys()
        numbers = stored.max(axis=1)
        (rows,) = np.nonzero(numbers >= 0)
        if len(rows) and not has_segments(folder_of(self.path)):
            raise RunFileError(
                f"The gradients of `{self.path}` should be in `{folder_of(self.path)}`. Found none "
                "there. Move file and folder together, under one name."
            )
        whole = rows[segments.whole(self.path, numbers[rows], keys[rows])]
        self.gradient_rows = int(numbers[whole].max(initial=-1)) + 1
        self._announced = segments.count(self.gradient_rows)
        torn = rows[rows > whole.max(initial=-1)]
        if len(torn):
            stored[torn] = -1
            self._mended["stored"] = stored
            log.warning(
                "The gradients of %d rows of %s, from step %d on, were not written by every "
                "process. Of these rows only the rest is continued.",
                len(torn), self.path, keys[torn[0], KEY.index("step")],
            )  # fmt: skip

    def _hold(self, contents: Contents) -> None:
        self._contents = contents
        if contents.gradients is not None:
            self._segments = Segments(contents, self.parameters)
            self._shard = Shard(self.path, self._segments, rank=0)

    def _make_room(self, row: Row) -> None:
        """Have a file with room for the row, which shows the segment of its gradients."""
        full, first = self.count == self._capacity, self._file is None
        capacity = self._larger() if full else self._capacity
        announced = self._announced
        if row.gradients is not None:
            assert self._segments is not None
            if (count := self._segments.count(self.gradient_rows + 1)) > announced:
                self._announced = max(count, 2 * announced)
        if full or self._announced > announced:
            self._replace(capacity)
        if first:
            self._sweep()
            # Of a run that was there before, or of a first row that was never counted.
            ranks = len(self._segments.ranks) if self._segments else 1
            remove_segments(folder_of(self.path), lambda rank: not 0 < rank < ranks)

    def _larger(self) -> int:
        """The capacity of a file with room for more rows than there are."""
        if self._planned > self.count:
            return self._planned
        assert self._contents is not None
        cheap = SPARE_BYTES // row_bytes(self._contents, self.parameters)
        twice, gently = max(FIRST_CAPACITY, self.count), max(cheap, self.count // 4, 1)
        return self.count + min(twice, gently)

    def _add(self, row: Row) -> None:
        self._put(row, self.count, self.gradient_rows)
        self._count(self.count + 1)

    def _put(self, row: Row, place: int, gradients: int) -> None:
        """Write a row; it has to be in the file before the number that makes it count."""
        assert self._file is not None
        check_identity(self.path, self._identity)
        entries = row.datasets()
        if self._segments is not None:
            present = row.gradients or {}
            entries["stored"] = [
                gradients if source in present else -1 for source in self._segments.sources
            ]
        if row.gradients is not None:
            assert self._shard is not None
            self._shard.write(gradients, row)
        for name, entry in entries.items():
            self._file[name][place] = entry
        self._file.flush()

    def _count(self, rows: int) -> None:
        assert self._file is not None
        self._file["committed"][()] = rows
        self._file.flush()

    def _settle(self, state: str) -> None:
        # No copy where the file is as it should stay: it would take the room of two.
        assert self._file is not None
        announced = self._segments.count(self.gradient_rows) if self._segments else 0
        spare = len(self._file["steps/step"]) > self.count or announced < self._announced
        if spare or self._tables or self._mended:
            self._announced = announced
            self._replace(self.count, state)
        else:
            check_identity(self.path, self._identity)
            self._file.attrs.modify("state", np.bytes_(state))
            self._file.flush()

    def _replace(self, capacity: int, state: str = "open") -> None:
        """Put a file with room for `capacity` rows, and with those there are, in its place."""
        assert self._contents is not None
        held: Mapping[str, h5py.Dataset | NDArray[np.int64]] = {}
        if self._file is not None:
            check_identity(self.path, self._identity)
            held = {name: self._file[name] for name in ROWS if name in self._file} | self._mended
        image = Image()
        with h5py.File(image, "w", **OPTIONS) as file:
            rooms = lay_out(
                file,
                self._contents,
                self.parameters,
                count=self.count,
                capacity=capacity,
                state=state,
            )
            keep_tables(file, self._file, self._tables)
            if self._segments is not None:
                self._segments.announce(file, self.path, self._announced)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.draft")
        try:
            with draft.open("wb") as stream:
                image.save(stream)
                for name, room in rooms.items():
                    fill(room, stream, held.get(name), self.count)
                stream.flush()
                os.fsync(stream.fileno())
            if self._file is not None:
                self._file.close()
            elif not self._overwrite:
                _refuse_to_replace(draft, self.path)
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._file = self._open()
        self._capacity = capacity
        self._tables.clear()
        self._mended.clear()
        self._dropping = False

    def _open(self) -> h5py.File:
        self._identity = identity(self.path)
        try:
            return h5py.File(self.path, "r+", **OPTIONS)
        except BlockingIOError as error:
            raise self._in_use() from error

    def _sweep(self) -> None:
        """Remove what killed writers of this file, which is ours now, left half made."""
        own = re.compile(re.escape(f".{self.path.name}.") + r"\d+\.draft")
        for draft in self.path.parent.iterdir():
            if own.fullmatch(draft.name):
                draft.unlink(missing_ok=True)

    def _undo(self) -> None:
        """Remove the file that was made for a first row which could not be written."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            remove_segments(folder_of(self.path), (0).__eq__)

    @property
    def _there(self) -> bool:
        # Both the file that is ours, and the gradients that it counts.
        return identity(self.path) == self._identity and (
            not self.gradient_rows or has_segments(folder_of(self.path))
        )

    def _let_go(self) -> None:
        """Leave the file to others, for good."""
        if self._ended:
            return
        self._ended = True
        if _being_written.get(self.path) is self:
            del _being_written[self.path]
        if self._shard is not None:
            self._shard.close()
        if self._file is not None:
            self._file.close()

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
            if not began:
                safe = (
                    "Nothing of this run was written. Mend the cause, such as a full disk, and "
                    "record again."
                )
            elif self._there:
                safe = (
                    f"The rows before it are whole, {self.count} of them. Mend the cause, such as "
                    "a full disk, and continue the file with resume=True."
                )
            else:
                safe = (
                    f"Of the {self.count} rows before it something was moved or removed. Put file "
                    "and folder back and continue with resume=True, or record again."
                )
            if self._file is not None and not began and self._there:
                self._undo()
            raise RunFileError(
                f"Run file `{self.path}` should be writable at step {step}. Found: {error}. {safe}"
            ) from error


def _check_table(name: str, columns: Columns) -> None:
    for label in (name, *columns):
        if not label or "/" in label or set(label) == {"."}:
            raise ValueError(
                "The name of a table or of its column should be a word without a slash. Found "
                f"`{label}`. Name it otherwise."
            )
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The columns of table `{name}` should be equally long. Found {lengths}. Give every "
            "row a value in each of them."
        )
    for column, values in columns.items():
        numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
        if not numbers and not all(isinstance(v, str) and "\0" not in v for v in values):
            raise ValueError(
                f"Column `{column}` of table `{name}` should be an array of numbers, or a list of "
                f"texts without NUL. Found {type(values).__name__}. Convert it."
            )


def _refuse_to_replace(draft: Path, path: Path) -> None:
    """Take the place of a file that is not there, or raise a FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without links: a look instead.
        if path.exists():
            raise FileExistsError(path) from None
