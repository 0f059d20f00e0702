"""A run file that is open for writing."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from .checksums import record_of
from .contiguous import OPTIONS, check_identity, identity
from .labels import as_texts
from .layout import Columns, Held, carried
from .opening import opened
from .place import in_use
from .processes import not_inherited
from .schema import ROWS, STATES, Array
from .tables import read_table, tables_in


class OpenFile:
    """The file that is ours, as long as it has its name."""

    def __init__(self, path: Path) -> None:
        self._path, self._identity = path, identity(path)
        try:
            self.file = h5py.File(path, "r+", **OPTIONS)
        except BlockingIOError as error:
            raise in_use(path) from error
        not_inherited(self)

    @property
    def held(self) -> h5py.File:
        """The file, which a forked process does not get."""
        return self.file

    @property
    def is_there(self) -> bool:
        """Whether no other file has taken its name."""
        return identity(self._path) == self._identity

    @property
    def rows(self) -> dict[str, h5py.Dataset]:
        """The datasets that have one entry a row."""
        self.check()
        return self._rows

    @cached_property
    def _rows(self) -> dict[str, h5py.Dataset]:
        return {name: self.file[name] for name in ROWS if name in self.file}

    @cached_property
    def _committed(self) -> h5py.Dataset:
        return self.file["committed"]

    def carried(
        self, shapes: Mapping[str, tuple[int, ...]], count: int, mended: Held
    ) -> dict[str, h5py.Dataset | Array]:
        """The datasets of the rows, those that are `mended` as these are, and their checksums."""
        held: dict[str, h5py.Dataset | Array] = {**self.rows, **mended}
        # A file of format 2 has none.
        names = as_texts(self.file["checksummed"][:]) if "checksummed" in self.file else []
        return held | {"checksums": carried(held, names, shapes, count, mended)}

    def tables(self) -> dict[str, Columns]:
        """The tables that are kept with the run."""
        if "tables" in self.file and not len(self.file["tables"]):
            return {}
        with opened(self._path) as file:
            return {name: read_table(file, name, kept) for name, kept in tables_in(file).items()}

    def check(self) -> None:
        """Raise an OSError where what is written would be lost."""
        check_identity(self._path, self._identity)

    def put(self, index: int, entries: Mapping[str, Array]) -> None:
        """Write the entries of a row, which counts from the next `count` on."""
        for name, entry in entries.items():
            _write_row(self._rows[name], index, entry)
        self.file.flush()

    def count(self, rows: int) -> None:
        """Say how many rows count."""
        _, complete, labels, _ = self._committed[:].tolist()
        self._commit(record_of(rows, labels, complete=complete))

    def mark(self, *, complete: bool) -> None:
        """Say whether the run is complete."""
        self.check()
        self.file.attrs.modify("state", np.bytes_(STATES[complete]))
        rows, _, labels, _ = self._committed[:].tolist()
        self._commit(record_of(rows, labels, complete=complete))

    def close(self) -> None:
        """Leave it to others."""
        self.file.close()

    def _commit(self, record: Array) -> None:
        self._committed.id.write(h5py.h5s.ALL, h5py.h5s.ALL, record)
        self.file.flush()


def _write_row(dataset: h5py.Dataset, index: int, entry: Array) -> None:
    # Not `dataset[index] = entry`, which takes ten times as long as HDF5 does.
    room, row = dataset.id.get_space(), (1, *entry.shape)
    room.select_hyperslab((index, *[0] * entry.ndim), row)
    dataset.id.write(h5py.h5s.create_simple(row), room, np.ascontiguousarray(entry))
