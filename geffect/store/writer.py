"""The one writer of a run file. What it has counted survives a kill at any moment."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py

from geffect.layers import Parameter

from .layout import copy_rows, lay_out
from .reader import Run, open_run
from .schema import Row, RunFileError

FIRST_CAPACITY = 64

# Files of the latest format cannot be reopened after a killed writer, even when flushed.
_OPTIONS = {"libver": ("v108", "v108")}


# HDF5 locks a file against other processes, not against a second writer in its own.
_being_written: set[Path] = set()


class RunWriter:
    """Appends steps to a run file.

    The file appears with its first step. Until then an existing file is untouched, also when it is
    to be overwritten. Sources, rectification blocks and the manifest are those of the first step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parameters: Sequence[Parameter],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = Path(
            path
        ).resolve()  # of a link, what it points to; whatever the working folder
        self.parameters = tuple(parameters)
        self.count = 0
        self.last_step = -1
        self.resumed: Run | None = None
        self._overwrite = overwrite
        self._file: h5py.File | None = None
        self._capacity = 0
        self._ended = False
        self._check_place(overwrite, resume)
        if resume and self.path.exists():
            self._continue(open_run(self.path))
        _being_written.add(self.path)

    def append(
        self,
        row: Row,
        *,
        sources: Sequence[str],
        blocks: Sequence[str],
        manifest: Mapping[str, object],
    ) -> None:
        """Write one step and count it."""
        self.check_open()
        if self._file is None and self._overwrite:
            self._check_free()
        with self._failing(row.step):
            if self._file is None:
                self._create(row, sources, blocks, manifest)
            else:
                self._add(row)
        self.count += 1
        self.last_step = row.step

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
        unchanged = self.resumed is not None and self.count == len(self.resumed.steps)
        if self._file is not None and (complete or not unchanged):
            with self._failing(self.last_step):
                self._replace(capacity=self.count, state="complete" if complete else "open")
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
                "another recorder of this process. Close that one first, or choose another name."
            )
        if self.path.exists() and not (overwrite or resume):
            raise FileExistsError(
                f"A new run file should not exist yet. Found `{self.path}`. Choose another name, "
                "continue it with resume=True, or replace it with overwrite=True."
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

    def _continue(self, run: Run) -> None:
        here = [(p.name, p.shape) for p in self.parameters]
        there = [(p.name, p.shape) for p in run.layers]
        if here != there:
            differing = sorted({name for name, _ in set(here) ^ set(there)})
            raise ValueError(
                f"The model should have the parameters of the run in `{self.path}`. Found "
                f"{len(differing)} that differ, the first of them {differing[:3]}. Record into "
                "another file, or load the model of that run."
            )
        self.resumed = run
        self.count = len(run.steps)
        self.last_step = int(run.steps[-1]) if self.count else -1
        # No room is taken to be left: the first step makes some, and until then the file is as it
        # was.
        self._capacity = self.count
        with self._failing(self.last_step):
            self._file = self._open()
        self._sweep()

    def _create(
        self,
        row: Row,
        sources: Sequence[str],
        blocks: Sequence[str],
        manifest: Mapping[str, object],
    ) -> None:
        with self._taking_its_place() as file:
            lay_out(
                file,
                row,
                parameters=self.parameters,
                sources=sources,
                blocks=blocks,
                manifest=manifest,
                capacity=FIRST_CAPACITY,
            )
        self._capacity = FIRST_CAPACITY
        self._sweep()

    def _add(self, row: Row) -> None:
        if self.count == self._capacity:
            self._replace(capacity=max(FIRST_CAPACITY, 2 * self._capacity))
        assert self._file is not None
        for name, entry in row.datasets().items():
            self._file[name][self.count] = entry
        # The row has to be in the file before the number that makes it count.
        self._file.flush()
        self._file["committed"][()] = self.count + 1
        self._file.flush()

    def _replace(self, capacity: int, state: str = "open") -> None:
        """Put a copy with room for `capacity` steps in the place of the file."""
        assert self._file is not None
        old = self._file
        with self._taking_its_place() as file:
            copy_rows(old, file, count=self.count, capacity=capacity, state=state)
        self._capacity = capacity

    @contextlib.contextmanager
    def _taking_its_place(self) -> Iterator[h5py.File]:
        """A new file that is moved to the path of the run when it is whole, and opened there."""
        # Made in memory: HDF5 does not survive a disk that is full, a write of our own does.
        image = io.BytesIO()
        with h5py.File(image, "w", **_OPTIONS) as file:
            yield file
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.draft")
        try:
            with draft.open("wb") as stream:
                stream.write(image.getbuffer())
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

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r+", **_OPTIONS)
        except BlockingIOError as error:
            raise self._in_use() from error

    def _sweep(self) -> None:
        """Remove what killed writers of this file, which is ours now, left half made."""
        own = re.compile(re.escape(f".{self.path.name}.") + r"\d+\.draft")
        for draft in self.path.parent.iterdir():
            if own.fullmatch(draft.name):
                draft.unlink(missing_ok=True)

    def _let_go(self) -> None:
        """Leave the file to others, for good."""
        if self._ended:
            return
        self._ended = True
        _being_written.discard(self.path)
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
            safe = (
                f"The steps before it are whole, {self.count} of them. Mend the cause, such as a "
                "full disk, and continue the file with resume=True."
                if self.count
                else "Nothing of this run was written. Mend the cause, such as a full disk, and "
                "record again."
            )
            raise RunFileError(
                f"Run file `{self.path}` should be writable at step {step}. Found: {error}. {safe}"
            ) from error


def _refuse_to_replace(draft: Path, path: Path) -> None:
    """Take the place of a file that is not there, or raise a FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without links: a look instead.
        if path.exists():
            raise FileExistsError(path) from None
