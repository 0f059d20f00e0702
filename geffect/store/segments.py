"""Where stored gradients lie: which segment holds which row, and which rank which part of it.

All of it follows from what is stored, so that every rank, the reader and a resumed run agree.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geffect.encodings import ENCODINGS, Layout
from geffect.layers import Parameter, layers_of

from . import checksums
from .bounds import BoundedFile, read_hdf5
from .contiguous import Image, declare, written
from .origin import is_empty, is_segment
from .outside import check_folder, is_plain
from .schema import FORMAT, KEY, VERSION, Contents, RunFileError, UnreadableError

FIRST_ROWS, SEGMENT_BYTES = 8, 1 << 28
"""The first segment has so many rows and each further one twice as many, up to so many bytes a rank
or one row. A part of the format: a file does not say it."""

SEGMENT = re.compile(r"(?P<number>\d{3,})\.rank(?P<rank>\d+)\.h5")
"""The names of segments."""

_KEYS = np.dtype("<i8")


def folder_of(path: Path) -> Path:
    """The folder with the segments of a run file."""
    return path.with_suffix(".gradients")


def file_name(number: int, rank: int) -> str:
    """The name of one segment of one rank."""
    return f"{number:03d}.rank{rank}.h5"


@dataclass(frozen=True)
class Piece:
    """A part of an array of a layer: where it is in what a rank holds, and where in the whole."""

    rank: int
    held: slice
    whole: slice


class Segments:
    """The segments of a run."""

    def __init__(self, contents: Contents, parameters: Sequence[Parameter]) -> None:
        assert contents.gradients is not None
        self.sources = contents.sources
        self.checked = contents.version > 2
        self.stored = contents.gradients
        self.encoding = ENCODINGS[self.stored.encoding]
        self.ranks = range(len(self.stored.ranges))
        stored = [parameters[i] for i in self.stored.parameters]
        self.layers: dict[str, list[int]] = {layer: [] for layer in layers_of(stored)}
        for index, parameter in enumerate(stored):
            self.layers[parameter.layer].append(index)
        self._numel = [parameter.numel for parameter in stored]

    def numel(self, layer: str) -> int:
        """How many numbers a gradient has in a layer."""
        return sum(self._numel[index] for index in self.layers[layer])

    def arrays(self, layer: str) -> Layout:
        """The arrays of a layer, whole."""
        return self.encoding.arrays(self.numel(layer))

    def held(self, layer: str, rank: int) -> Layout:
        """The arrays of what a rank holds of a layer; none where it holds nothing."""
        numel = sum(stop - start for start, stop in self._ranges(layer, rank))
        return self.encoding.arrays(numel) if numel else {}

    def pieces(self, layer: str) -> Iterator[Piece]:
        """How the arrays of the ranks make up those of the layer.

        With more than one rank an encoding has one entry a number; with one, all is one piece.
        """
        if len(self.ranks) == 1:
            yield Piece(0, slice(None), slice(None))
            return
        for rank in self.ranks:
            held = begin = 0
            for index, (start, stop) in zip(
                self.layers[layer], self._ranges(layer, rank), strict=True
            ):
                if count := stop - start:
                    whole = slice(begin + start, begin + stop)
                    yield Piece(rank, slice(held, held + count), whole)
                held += count
                begin += self._numel[index]

    @cached_property
    def row_bytes(self) -> int:
        """How long a row is, over all ranks."""
        return sum(self._rank_bytes)

    @property
    def blocks(self) -> tuple[int, int]:
        """How many checksums a row has: by source and layer."""
        return len(self.sources), len(self.layers)

    def rows(self, number: int) -> int:
        """How many rows a segment has room for: as many on every rank."""
        most = max(1, SEGMENT_BYTES // max(1, *self._rank_bytes))
        return min(most, FIRST_ROWS << min(number, 62))

    def locate(self, row: int) -> tuple[int, int]:
        """The segment that a row is in, and where there."""
        number = 0
        while row >= (room := self.rows(number)):
            row -= room
            number += 1
        return number, row

    def count(self, rows: int) -> int:
        """How many segments so many rows take."""
        return self.locate(rows - 1)[0] + 1 if rows else 0

    def image(self, number: int, rank: int) -> Image:
        """A segment with nothing in it."""
        image, rows = Image(), self.rows(number)
        with written(image) as file:
            file.attrs.create("format", np.bytes_(FORMAT))
            file.attrs.create("format_version", VERSION)
            file.attrs.create("encoding", np.bytes_(self.encoding.name))
            # Which rows are whole: zero until then, the mark of the run from then on; and the key.
            declare(file, "keys", (rows, 1 + len(KEY)), _KEYS)
            declare(file, "checksums", (rows, *self.blocks), checksums.DTYPE)
            for source in self.sources:
                for layer in self.layers:
                    for name, (shape, dtype) in self.held(layer, rank).items():
                        declare(file, f"{source}/{layer}/{name}", (rows, *shape), dtype)
        return image

    def whole(
        self, path: Path, rows: NDArray[np.int64], keys: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of some rows, with these keys, all ranks wrote whole."""
        numbers, inside = np.array([self.locate(row) for row in rows.tolist()]).reshape(-1, 2).T
        whole = np.ones(len(rows), dtype=bool)
        for number in np.unique(numbers).tolist():
            own = numbers == number
            for rank in self.ranks:
                # What a damaged file raises has no end; all of it says that the row is not there.
                try:
                    with _read(folder_of(path) / file_name(number, rank)) as file:
                        found = self._keys(file, number)[inside[own]]
                except (UnreadableError, PermissionError):  # what is there, nobody knows
                    raise
                except Exception:
                    found = np.zeros(1 + len(KEY), dtype=_KEYS)
                whole[own] &= (found[..., 0] == self.stored.mark) & (
                    found[..., 1:] == keys[own]
                ).all(axis=1)
        return whole

    def own(self, path: Path, names: Iterable[str], rows: int | None = None) -> set[str]:
        """Those of some segments that are of this run, and of its first so many rows.

        So is one behind these, and what is no plain file, which is never removed.
        """
        own = set()
        for name in names:
            found = SEGMENT.fullmatch(name)
            number, rank = (int(found[part]) for part in ("number", "rank")) if found else (-1, -1)
            counts = rank in self.ranks and (rows is None or number <= self.count(rows))
            if counts and name == file_name(number, rank) and self.may_replace(path, number, rank):
                own.add(name)
        return own

    def may_replace(self, path: Path, number: int, rank: int) -> bool:
        """Whether nothing of others has the place of a segment: rows of this run alone, or none.

        Where damage took the marks of its rows, it has to be a segment at least.
        """
        place = folder_of(path) / file_name(number, rank)
        if not is_plain(place):
            return True
        try:
            with _read(place) as file:
                marks = file.rows("keys", _KEYS, 0, (1 + len(KEY),)).all()[:, 0]
        except Exception:  # as above
            return is_empty(place) or is_segment(place)
        return bool(np.isin(marks, (0, self.stored.mark)).all())

    def read(
        self, path: Path, source: str, row: int, key: tuple[int, ...]
    ) -> list[NDArray[np.float32]]:
        """A gradient by layer, out of the segments beside a run file."""
        wholes: dict[str, dict[str, NDArray[Any]]] = {layer: {} for layer in self.layers}
        for rank in self.ranks:
            with self._opened(path, row, rank, key) as file:
                for layer, arrays in wholes.items():
                    held = self._block(file, source, layer, row, rank, key)
                    # Not before all that the first rank holds is there: the file has room for it.
                    for name, (shape, dtype) in self.arrays(layer).items():
                        arrays.setdefault(name, np.empty(shape, dtype))
                    for piece in self.pieces(layer):
                        if piece.rank == rank:
                            for name, values in held.items():
                                arrays[name][piece.whole] = values[piece.held]
        return [self.encoding.decode(arrays, self.numel(layer)) for layer, arrays in wholes.items()]

    def _block(
        self, file: BoundedFile, source: str, layer: str, row: int, rank: int, key: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """What a rank holds of a layer of a gradient."""
        number, inside = self.locate(row)
        room, found = self.rows(number), {}
        for name, (shape, dtype) in self.held(layer, rank).items():
            dataset = file.dataset(f"{source}/{layer}/{name}", dtype, (room, *shape))
            (found[name],) = dataset.rows(inside, inside + 1)
        if self.checked:
            sums = file.dataset("checksums", checksums.DTYPE, (room, *self.blocks))
            (blocks,) = sums.rows(inside, inside + 1)
            written = blocks[self.sources.index(source), list(self.layers).index(layer)]
            if checksums.of_block(source, layer, key, found.values()) != written:
                raise checksums.Changed(f"the gradient of `{source}` in {layer}")
        return found

    def _keys(self, file: BoundedFile, number: int) -> NDArray[np.int64]:
        return file.dataset("keys", _KEYS, (self.rows(number), 1 + len(KEY))).all()

    def announce(self, file: h5py.File, path: Path, count: int) -> None:
        """Let a run file show `count` segments as if they were its own, for any HDF5 reader."""
        if not count:
            return
        for source in self.sources:
            for layer, indices in self.layers.items():
                group = file.create_group(f"gradients/{source}/{layer}")
                group.attrs["parameters"] = [self.stored.parameters[index] for index in indices]
                for array in self.arrays(layer):
                    self._announce_array(group, path, layer, array, count)
        file["gradients"].attrs["encoding"] = self.encoding.name

    def _announce_array(
        self, group: h5py.Group, path: Path, layer: str, array: str, count: int
    ) -> None:
        shape, dtype = self.arrays(layer)[array]
        begins = np.cumsum([0, *map(self.rows, range(count))]).tolist()
        dataset = f"{group.name.removeprefix('/gradients')}/{array}".encode()
        space = h5py.h5s.create_simple((begins[-1], *shape))
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_fill_value(np.array(_missing(dtype), dtype))
        for piece in self.pieces(layer):
            held, _ = self.held(layer, piece.rank)[array]
            for number, (begin, end) in enumerate(pairwise(begins)):
                origin = h5py.h5s.create_simple((end - begin, *held))
                _select(origin, 0, end - begin, piece.held, held)
                _select(space, begin, end, piece.whole, shape)
                segment = f"{folder_of(path).name}/{file_name(number, piece.rank)}"
                # A percent sign would begin a pattern of names.
                escaped = segment.encode().replace(b"%", b"%%")
                plan.set_virtual(space, escaped, dataset, origin)
        space.select_all()
        h5py.h5d.create(group.id, array.encode(), h5py.h5t.py_create(dtype), space, plan)

    @contextmanager
    def _opened(
        self, path: Path, row: int, rank: int, key: tuple[int, ...]
    ) -> Iterator[BoundedFile]:
        """The segment with what a rank holds of a row, which must be there whole."""
        number, inside = self.locate(row)
        segment = folder_of(path) / file_name(number, rank)
        request, step, batch = key
        should = (
            f"`{segment}` should hold the gradients of step {step} (request {request}, batch "
            f"{batch}) of `{path}`."
        )
        try:
            with _read(segment) as file:
                mark, *found = self._keys(file, number)[inside].tolist()
                if mark != self.stored.mark or tuple(found) != key:
                    raise ValueError("a row that is half written, or of another step or run")
                yield file
        except (UnreadableError, PermissionError):
            raise
        except checksums.Changed as error:
            raise RunFileError(
                f"{should} Found {error} with another checksum. Take an earlier copy of file and "
                "folder, or record the step again."
            ) from error
        # Of damage HDF5 and h5py make errors of every kind.
        except Exception as error:
            raise RunFileError(
                f"{should} Found: {str(error) or type(error).__name__}. Move file and folder "
                "together, under one name; what a process did not write before it was killed has "
                "to be recorded again."
            ) from error

    @cached_property
    def _rank_bytes(self) -> list[int]:
        return [
            len(self.sources)
            * sum(
                prod(shape) * dtype.itemsize
                for layer in self.layers
                for shape, dtype in self.held(layer, rank).values()
            )
            for rank in self.ranks
        ]

    def _ranges(self, layer: str, rank: int) -> list[tuple[int, int]]:
        return [self.stored.ranges[rank][index] for index in self.layers[layer]]


@contextmanager
def _read(segment: Path) -> Iterator[BoundedFile]:
    check_folder(segment.parent)
    with read_hdf5(segment) as file:
        yield file


def _select(space: Any, begin: int, end: int, part: slice, entry: tuple[int, ...]) -> None:
    """Select a part of each of some rows."""
    start, stop, _ = part.indices(entry[0])
    space.select_hyperslab((begin, start), (1, 1), None, (end - begin, stop - start))


def _missing(dtype: np.dtype[Any]) -> float:
    """What stands for the numbers of a segment that is not there: NaN, also as bits of bfloat16."""
    return {"f": np.nan, "u": 0x7FC0 if dtype.itemsize == 2 else 0}.get(dtype.kind, 0)
