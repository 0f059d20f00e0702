"""What one rank writes of the gradients of a run."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import FileIO
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.drafts import draft_of, remove_left
from geffect.layers import Parameter

from . import checksums
from .contiguous import OPTIONS, Identity, Room, check_identity, identity
from .future import Future
from .layout import Columns
from .outside import check_folder, check_plain, is_folder, is_plain
from .paths import place_of
from .processes import Home, not_inherited
from .schema import Contents, Row, RunFileError
from .segments import SEGMENT, Segments, file_name, folder_of

_DRAFT = re.compile(rf"\.{SEGMENT.pattern}\.[0-9a-f]+\.draft")


class Shard:
    """The segments of one rank. One of them is being written.

    Errors are OSErrors that name the segment. HDF5 keeps it open, which locks it; the numbers are
    written beside HDF5, to where it said that they belong.
    """

    def __init__(self, path: Path, segments: Segments, rank: int) -> None:
        self.folder = folder_of(path)
        self._path = path
        self._segments = segments
        self._rank = rank
        self._number = -1
        self._file: h5py.File | None = None
        self._stream: FileIO | None = None
        self._identity: Identity = None
        self._rooms: dict[str, Room] = {}
        not_inherited(self)

    @property
    def held(self) -> h5py.File | None:
        """The segment, which a forked process does not get."""
        return self._file

    def write(self, number: int, row: Row) -> None:
        """Write the gradients of a row as row `number`; it counts when all of it is there."""
        assert row.gradients is not None
        if row.arrived is not None:
            row.arrived()
        number, inside = self._segments.locate(number)
        try:
            if number != self._number:
                self._open(number, fresh=inside == 0)
            assert self._stream is not None
            check_identity(self._place(number), self._identity)
            keys = self._rooms["keys"]
            mark = np.array([self._segments.stored.mark, *row.key], dtype=keys.dtype)
            keys.write(self._stream, inside, np.zeros_like(mark))
            sums = Future(partial(self._checksums, row), row.nbytes)
            for source, layers in row.gradients.items():
                for layer, arrays in layers.items():
                    for name, values in arrays.items():
                        if values.size:
                            room = self._rooms[f"{source}/{layer}/{name}"]
                            room.write(self._stream, inside, values)
            self._rooms["checksums"].write(self._stream, inside, sums.result())
            keys.write(self._stream, inside, mark)
        except OSError as error:
            place = str(self._place(number))
            raise OSError(error.errno, error.strerror or str(error), place) from error

    def close(self) -> None:
        """Leave the segment to others."""
        if self._stream is not None:
            self._stream.close()
        if self._file is not None:
            self._file.close()
        self._number, self._stream, self._file = -1, None, None

    def _checksums(self, row: Row) -> NDArray[np.uint32]:
        sums = np.zeros(self._segments.blocks, dtype=checksums.DTYPE)
        for i, source in enumerate(self._segments.sources):
            layers = (row.gradients or {}).get(source)
            for j, layer in enumerate(self._segments.layers if layers is not None else ()):
                held = self._segments.held(layer, self._rank)
                arrays = [layers[layer][name] for name in held] if layers is not None else []
                sums[i, j] = checksums.of_block(source, layer, row.key, arrays)
        return sums

    def _place(self, number: int) -> Path:
        return self.folder / file_name(number, self._rank)

    def _open(self, number: int, *, fresh: bool) -> None:
        self.close()
        place = self._place(number)
        check_folder(self.folder)
        check_plain(place)
        if fresh or not place.exists():
            self._create(place, number)
        self._file = h5py.File(place, "r+", **OPTIONS)
        self._rooms = {}
        self._file.visititems(self._note)
        self._stream = FileIO(place, "r+")
        self._identity = identity(place)
        self._number = number

    def _create(self, place: Path, number: int) -> None:
        if not self._segments.may_replace(self._path, number, self._rank):
            raise OSError(errno.EBUSY, "The gradients of another run are there", str(place))
        if number == 0:
            self.folder.mkdir(exist_ok=True)
        _remove(self.folder, _DRAFT, self._rank.__eq__, remove_left)
        with draft_of(place) as draft:
            with draft.open("r+b") as stream:
                self._segments.image(number, self._rank).save(stream)
            draft.replace(place)

    def _note(self, name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            self._rooms[name] = Room.of(item)


class ShardWriter:
    """Writes what a further rank holds of the gradients; rank 0 has a `RunWriter`.

    `first` is how many rows with gradients the run has already, which rank 0 knows as
    `RunWriter.gradient_rows`. What rank 0 does not count does not count, whatever is written here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parameters: Sequence[Parameter],
        rank: int,
        *,
        first: int = 0,
    ) -> None:
        self._path = place_of(path)
        self._parameters = parameters
        self._rank = rank
        self._written = first
        self._shard: Shard | None = None
        self._ended = False
        self._home = Home()

    def begin(self, contents: Contents) -> None:
        """Say what the rows hold; nothing is written where this rank holds none of it."""
        self.check_open()
        gradients = contents.gradients
        if gradients is not None and self._rank < len(gradients.ranges):
            self._shard = Shard(self._path, Segments(contents, self._parameters), self._rank)

    def append(self, row: Row) -> None:
        """Write the gradients of a row, if it has some."""
        self.check_open()
        if self._shard is None or row.gradients is None:
            return
        with self._failing(row.step):
            if not self._written:
                remove_segments(self._shard.folder, self._rank.__eq__)
            self._shard.write(self._written, row)
        self._written += 1

    def amend(self, row: Row) -> None:
        """Write them in the place of those of the last row."""
        self.check_open()
        if self._shard is not None and row.gradients is not None:
            with self._failing(row.step):
                self._shard.write(self._written - 1, row)

    def keep(self, name: str, columns: Columns) -> None:
        """Leave a table to rank 0, which has the run file."""
        self.check_open()

    def check_open(self) -> None:
        """Refuse to go on after the end."""
        self._home.check(self._path)
        if self._ended:
            raise RunFileError(
                f"The recorder of `{self._path}` should be open on rank {self._rank}. Found it "
                "closed, or failed at an earlier step. Make another one, with resume=True to "
                "continue the run."
            )

    def close(self, *, complete: bool) -> None:
        """Leave the segments to others, complete or not."""
        if self._home.is_here and self._shard is not None:
            self._shard.close()
        self._ended = True

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close(complete=False)
            raise RunFileError(
                f"The gradients of rank {self._rank} should be writable at step {step}. Found: "
                f"{error}. Mend the cause, such as a full disk, and continue the run with "
                "resume=True."
            ) from error


def segments_in(folder: Path) -> set[str]:
    """The names of the segments of a run in a folder, which need not exist."""
    names = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
    return {name for name in names if SEGMENT.fullmatch(name)}


def files_of_others(folder: Path) -> list[str]:
    """The names of what is in a folder beside segments of a run, finished and half made."""
    files = folder.iterdir() if is_folder(folder) else ()
    return sorted(
        file.name
        for file in files
        if not (is_plain(file) and (SEGMENT.fullmatch(file.name) or _DRAFT.fullmatch(file.name)))
    )


def remove_segments(folder: Path, of: Callable[[int], bool]) -> None:
    """Remove the segments of some ranks, finished and half made, and the folder if it is empty."""
    _remove(folder, SEGMENT, of, partial(Path.unlink, missing_ok=True))
    _remove(folder, _DRAFT, of, remove_left)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(
    folder: Path, kind: re.Pattern[str], of: Callable[[int], bool], remove: Callable[[Path], None]
) -> None:
    for file in folder.iterdir() if is_folder(folder) else ():
        found = kind.fullmatch(file.name)
        if found and of(int(found["rank"])) and is_plain(file):
            remove(file)
