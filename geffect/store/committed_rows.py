"""The rows of a run file that counted when it was opened. Needs neither torch nor the model."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.near import meant
from geffect.notes import OfArgument
from geffect.sources import AVERAGE, RECTIFIED, UPDATE

from .layout import entry_shapes
from .opening import opened, settled
from .rows import Rows
from .schema import KEY_COLUMNS, Contents, RunFileError
from .seen import Seen
from .segments import Segments
from .tables import read_table, tables_in

Made = TypeVar("Made")


@dataclass(frozen=True, repr=False)
class CommittedRows:
    """Some rows of a file, what they hold, and the tables beside them. Read when asked for."""

    path: Path
    contents: Contents
    layers: tuple[Parameter, ...]
    drawn: NDArray[np.int64]  # which rows of the file those are
    seen: Seen = field(compare=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the gradients, in the order of the Gram matrix."""
        return self.contents.sources

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Versions, what was recorded, and how."""
        return self.contents.manifest

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the user gave to the recorder."""
        metadata = self.manifest.get("metadata")
        if not isinstance(metadata, Mapping):
            raise RunFileError(
                f"The manifest of `{self.path}` should hold metadata. Found "
                f"{type(metadata).__name__}. Take an earlier copy, or record again."
            )
        return metadata

    def index(self, source: str) -> int:
        """The place of a source in the Gram matrix."""
        if source not in self.sources:
            raise OfArgument(
                "source",
                f"be one of {', '.join(self.sources)} in `{self.path}`. "
                f"Found `{source}`.{_how_to_have(source, self.sources)}",
            )
        return self.sources.index(source)

    def keys(self) -> NDArray[np.int64]:
        """Int64[row, 3]: request, step and batch, which tell the rows apart."""
        return np.stack(self.rows_of(KEY_COLUMNS), axis=1)

    def read(self, name: str, *entry: int) -> NDArray[Any]:
        """The rows of a dataset as they are in the file, or one entry of each."""
        (rows,) = self.rows_of([name], entry)
        return rows

    def once(self, of: Hashable, make: Callable[[], Made]) -> Made:
        """What is made of these rows; a run that holds what it read makes it once, by what it is
        of."""
        return make()

    def segments(self) -> Segments:
        """Where the gradients lie that are kept whole."""
        gradients = self.contents.gradients
        if gradients is None or gradients.encoding not in ENCODINGS:
            raise RunFileError(
                f"The gradients of `{self.path}` should be in one of the encodings "
                f"{', '.join(ENCODINGS)}. Found {gradients and gradients.encoding!r}. Read them "
                "with the version of geffect that wrote them."
            )
        return Segments(self.contents, self.layers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The datasets that have one entry a row, and the shape of an entry."""
        return entry_shapes(self.contents, self.layers)

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables that were kept with the run."""
        with opened(self.path) as file:
            self.seen.check(file)
            return tuple(tables_in(file))

    def table(self, name: str) -> dict[str, NDArray[Any]]:
        """The columns of a table that was kept with the run: numbers or texts."""
        with opened(self.path) as file:
            self.seen.check(file)
            if name in (kept := tables_in(file)):
                return read_table(file, name, kept[name])
        raise ValueError(
            f"`{self.path}` should hold a table `{name}`. Found {', '.join(kept) or 'none'}. "
            f"Keep it with recorder.keep_table({name!r}, columns)."
        )

    def rows_of(self, names: Sequence[str], entry: tuple[int, ...] = ()) -> list[NDArray[Any]]:
        """Those of several datasets, as they were at one moment."""
        return settled(lambda: self._read(names, entry))

    def checksums(self) -> NDArray[np.uint32]:
        """UInt32[row, dataset]: equal where rows are, so that one that was amended is seen.

        Files of format 2 have none.
        """
        first, count = self._ends
        with opened(self.path) as file:
            self.seen.check_rows(file, rows := Rows(file, count, first))
            return rows.sums[self.drawn - first]

    @property
    def _ends(self) -> tuple[int, int]:
        """The first of these rows, and how many rows the file has to have."""
        return (int(self.drawn.min()), int(self.drawn.max()) + 1) if len(self.drawn) else (0, 0)

    def _read(self, names: Sequence[str], entry: tuple[int, ...]) -> list[NDArray[Any]]:
        (first, count), shapes = self._ends, self.shapes
        unlisted = (len(self.layers),)  # of what this run may lack
        with opened(self.path) as file:
            self.seen.check_rows(file, rows := Rows(file, count, first))
            read = [rows.read(name, shapes.get(name, unlisted), entry) for name in names]
        if np.array_equal(self.drawn, np.arange(first, count)):
            return read
        return [found[self.drawn - first] for found in read]


def _how_to_have(source: str, names: Sequence[str]) -> str:
    """What to do for a source that is not among the names."""
    if source == UPDATE:
        return " Record with Recorder(..., update=True) to have it."
    watched = any(name.endswith(AVERAGE) for name in names)
    if not watched and (source == RECTIFIED or source.endswith(AVERAGE)):
        return " Record with recorder.backward(..., rectifier=rectifier) to have it."
    return (
        f"{meant(source, names)} Name one of those; or record it, as a loss of that name or, of a "
        "Trainer, as a probe."
    )
