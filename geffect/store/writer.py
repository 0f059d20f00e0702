"""The one writer of a run file. What it has counted survives a kill at any moment."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from weakref import WeakValueDictionary

from geffect.interrupts import to_the_end
from geffect.layers import Parameter

from .growing_file import GrowingFile
from .layout import Columns
from .paths import place_of
from .place import check_place
from .processes import Home
from .reader import Run, check_whole, open_run
from .schema import Contents, Row, RunFileError
from .tables import check_table

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
        self.last_step = -1
        self.resumed: Run | None = None
        self._file = GrowingFile(self.path, self.parameters, overwrite=overwrite, planned=rows or 0)
        self._begun = False
        self._unchanged = True
        self._ended = False
        self._home = Home()
        self._last_key: tuple[int, ...] | None = None
        _check_alone(self.path)
        check_place(self.path, overwrite=overwrite, resume=resume)
        if resume and self.path.exists():
            self._continue(open_run(self.path), drop_after)
        _being_written[self.path] = self

    @property
    def count(self) -> int:
        """How many rows count."""
        return self._file.count

    @property
    def gradient_rows(self) -> int:
        """How many rows have gradients."""
        return self._file.gradient_rows

    def begin(self, contents: Contents) -> None:
        """Say what the rows hold, once, before the first of them.

        Raises a ValueError that names what differs from the file that is continued.
        """
        self.check_open()
        self._begun = True
        there = self._file.contents
        if there is None:
            self._file.hold(contents)
            return
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
        if row.key == self._last_key:  # its caller was interrupted before it knew of the row
            self.amend(row)
            return
        if not self._begun:
            raise RuntimeError(
                "`begin` should be called before the first `append`. Found no call. Say first what "
                "the rows hold."
            )
        if not self._file.is_made:
            self._file.check_replaceable()
        with self._failing(row.step):
            self._file.append(row)
            self.last_step, self._last_key = row.step, row.key
            self._unchanged = False

    def amend(self, row: Row) -> None:
        """Write a row in the place of the last one, about which more is known now."""
        self.check_open()
        with self._failing(row.step):
            self._file.amend(row)

    def keep(self, name: str, columns: Columns) -> None:
        """Keep a table with the run, in the place of one of the same name.

        Columns are arrays of numbers or lists of texts, all equally long. Before the first row, and
        while rows are to be dropped, the table waits for that row.
        """
        self.check_open()
        check_table(name, columns)
        self._file.keep(name, columns)
        with self._failing(self.last_step):
            self._file.show_tables()

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
        if self._file.is_made and (complete or not self._unchanged):
            with self._failing(self.last_step):
                self._file.settle(complete=complete)
        self._let_go()

    def _continue(self, run: Run, drop_after: int | None) -> None:
        _check_parameters(self.parameters, run)
        check_whole(run)
        whole = run
        if drop_after is not None:
            run = run.until(drop_after)
        self._file.go_on(run, dropping=len(run.drawn) < len(whole.drawn))
        self.resumed = run
        self.last_step = int(run.steps[-1]) if self.count else -1
        with self._failing(self.last_step):
            self._file.open()

    def _let_go(self) -> None:
        """Leave the file to others, for good."""
        self._ended = True
        if _being_written.get(self.path) is self:
            _being_written.pop(self.path, None)
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
            safe = _safe(self.count, began=bool(began), there=self._file.is_there)
            if self._file.is_made and not began and self._file.is_there:
                self._file.undo()
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
    here = {p.name: f"{p.shape} of {p.dtype}" for p in parameters}
    there = {p.name: f"{p.shape} of {p.dtype}" for p in run.layers}
    if [*here.items()] != [*there.items()]:
        differing = sorted({name for name, _ in here.items() ^ there.items()})
        found = f"them in another order, {[*here][:3]} first"
        if differing:
            first = differing[0]
            found = (
                f"{len(differing)} that differ, the first of them `{first}`: "
                f"{here.get(first, 'none')} instead of {there.get(first, 'none')}"
            )
        raise ValueError(
            f"The model should have the parameters of the run in `{run.path}`. Found {found}. "
            "Record into another file, or load the model of that run."
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
