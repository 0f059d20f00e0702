"""A run file that is open for writing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .contiguous import OPTIONS, check_identity, identity
from .place import in_use
from .schema import ROWS


class OpenFile:
    """The file that is ours, as long as it has its name."""

    def __init__(self, path: Path) -> None:
        self._path, self._identity = path, identity(path)
        try:
            self.file = h5py.File(path, "r+", **OPTIONS)
        except BlockingIOError as error:
            raise in_use(path) from error

    @property
    def is_there(self) -> bool:
        """Whether no other file has taken its name."""
        return identity(self._path) == self._identity

    @property
    def rows(self) -> dict[str, h5py.Dataset]:
        """The datasets that have one entry a row."""
        self.check()
        return {name: self.file[name] for name in ROWS if name in self.file}

    def check(self) -> None:
        """Raise an OSError where what is written would be lost."""
        check_identity(self._path, self._identity)

    def put(self, place: int, entries: Mapping[str, Any]) -> None:
        """Write the entries of a row, which counts from the next `count` on."""
        for name, entry in entries.items():
            self.file[name][place] = entry
        self.file.flush()

    def count(self, rows: int) -> None:
        """Say how many rows count."""
        self.file["committed"][()] = rows
        self.file.flush()

    def mark(self, state: str) -> None:
        """Say whether the run is complete."""
        self.check()
        self.file.attrs.modify("state", np.bytes_(state))
        self.file.flush()

    def close(self) -> None:
        """Leave it to others."""
        self.file.close()
