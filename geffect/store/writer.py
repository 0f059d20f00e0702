"""The one writer of a run file. What it has counted survives a kill at any moment."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from geffect.layers import Parameter

from .reader import Run, open_run
from .schema import FORMAT, ROWS, VERSION, Row, RunFileError

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
        self.path = Path(path)
        self.parameters = tuple(parameters)
        self.count = 0
        self.last_step = -1
        self.resumed: Run | None = None
        self._overwrite = overwrite
        self._file: h5py.File | None = None
        self._capacity = 0
        self._check_place(overwrite, resume)
        _being_written.add(self.path.resolve())
        if resume and self.path.exists():
            self._continue(open_run(self.path))

    def append(
        self,
        row: Row,
        *,
        sources: Sequence[str],
        blocks: Sequence[str],
        manifest: Mapping[str, object],
    ) -> None:
        """Write one step and count it."""
        with self._failing(row.step):
            if self._file is None:
                self._create(row, sources, blocks, manifest)
            elif self.count == self._capacity:
                self._replace(capacity=2 * self._capacity)
            assert self._file is not None
            for name, entry in row.datasets().items():
                self._file[name][self.count] = entry
            # The row has to be in the file before the number that makes it count.
            self._file.flush()
            self._file["committed"][()] = self.count + 1
            self._file.flush()
        self.count += 1
        self.last_step = row.step

    def close(self, *, complete: bool) -> None:
        """Give back the unused rows. A file that is not complete stays marked as open."""
        _being_written.discard(self.path.resolve())
        if self._file is None:
            return
        with self._failing(self.last_step):
            self._replace(capacity=self.count, state="complete" if complete else "open")
        if self._file is not None:
            self._file.close()
            self._file = None

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
        if self.path.resolve() in _being_written:
            raise RunFileError(
                f"A run file should have one writer. Found that `{self.path}` is being written by "
                "another recorder of this process. Close that one first, or choose another name."
            )
        if self.path.exists() and not (overwrite or resume):
            raise FileExistsError(
                f"A new run file should not exist yet. Found `{self.path}`. Choose another name, "
                "continue it with resume=True, or replace it with overwrite=True."
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
        with self._failing(self.last_step):
            self._file = self._open()
            self._replace(capacity=max(FIRST_CAPACITY, 2 * self.count), state="open")

    def _create(
        self,
        row: Row,
        sources: Sequence[str],
        blocks: Sequence[str],
        manifest: Mapping[str, object],
    ) -> None:
        shapes = {name: np.shape(entry) for name, entry in row.datasets().items()}
        with self._taking_its_place() as file:
            file.attrs.update(format=FORMAT, format_version=VERSION, state="open")
            file["manifest"] = json.dumps(manifest)
            _write_table(file, "parameters", _columns(self.parameters))
            file["sources"] = _texts(sources)
            if blocks:
                file["rectification_blocks"] = _texts(blocks)
            for name, shape in shapes.items():
                _write_rows(file, name, FIRST_CAPACITY, shape)
            file["committed"] = np.int64(0)
            _label_axes(file)
        self._capacity = FIRST_CAPACITY

    def _replace(self, capacity: int, state: str = "open") -> None:
        """Put a copy with room for `capacity` steps in the place of the file."""
        assert self._file is not None
        old = self._file
        with self._taking_its_place() as file:
            file.attrs.update(format=FORMAT, format_version=VERSION, state=state)
            for name in old:
                if name not in ("gram", "losses", "rectification", "steps"):
                    old.copy(name, file, without_attrs=True)
            for name in ROWS:
                if name in old:
                    rows = _write_rows(file, name, capacity, old[name].shape[1:])
                    rows[: self.count] = old[name][: self.count]
            _label_axes(file)
            old.close()
        self._capacity = capacity

    @contextlib.contextmanager
    def _taking_its_place(self) -> Iterator[h5py.File]:
        """A new file that is moved to the path of the run when it is whole, and opened there."""
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.draft")
        try:
            with h5py.File(draft, "w", **_OPTIONS) as file:
                yield file
            with draft.open("rb") as whole:
                os.fsync(whole.fileno())
            if self._file is None and not self._overwrite:
                os.link(draft, self.path)  # unlike a rename, this refuses to replace a file
            else:
                draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._file = self._open()

    def _open(self) -> h5py.File:
        return h5py.File(self.path, "r+", **_OPTIONS)

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Say which file failed, at which step, and what is safe."""
        try:
            yield
        except FileExistsError as error:
            raise FileExistsError(
                f"A new run file should not exist yet. Found `{self.path}`, made by another "
                "process since this recorder was opened. Choose another name."
            ) from error
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(Exception):
                if self._file is not None:
                    self._file.close()
            self._file = None
            raise RunFileError(
                f"Run file `{self.path}` should be writable at step {step}. Found: {error}. "
                f"Its {self.count} steps before are whole: make room or end the other writer, and "
                "continue with resume=True."
            ) from error


def _texts(values: Sequence[str]) -> Any:
    return np.array(list(values), dtype=h5py.string_dtype())


def _columns(parameters: Sequence[Parameter]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for field in fields(Parameter):
        values = [getattr(parameter, field.name) for parameter in parameters]
        whole = all(isinstance(value, int) for value in values)
        # Shapes and further names are lists of any length: JSON keeps them in one column.
        columns[field.name] = (
            np.array(values, dtype="<i8")
            if whole
            else _texts([v if isinstance(v, str) else json.dumps(v) for v in values])
        )
    return columns


def _write_table(file: h5py.File, name: str, columns: Mapping[str, Any]) -> None:
    for column, values in columns.items():
        file[f"{name}/{column}"] = values


def _write_rows(file: h5py.File, name: str, capacity: int, shape: tuple[int, ...]) -> h5py.Dataset:
    empty = np.nan if ROWS[name].kind == "f" else -1
    # Written out, not only declared: the space is then there before the first row needs it.
    return file.create_dataset(name, data=np.full((capacity, *shape), empty, dtype=ROWS[name]))


def _label_axes(file: h5py.File) -> None:
    """Dimension scales, for readers such as xarray that know axes by name."""
    for scale in ("steps/step", "parameters/name", "sources"):
        file[scale].make_scale(scale.split("/")[-1])
    for name in ("gram", "losses"):
        axes = (
            ["steps/step", "parameters/name", "sources", "sources"]
            if name == "gram"
            else [
                "steps/step",
                "sources",
            ]
        )
        for axis, scale in enumerate(axes):
            file[name].dims[axis].attach_scale(file[scale])
