"""The ways in which a run is damaged. Each draws what it does from a generator."""

import random
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

Damage = Callable[[Path, random.Random], None]
"""What changes a file in place."""


def flip_bits(path: Path, chance: random.Random) -> None:
    """One bit, or some."""
    stored = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 2, 8))):
        stored[chance.randrange(len(stored))] ^= 1 << chance.randrange(8)
    path.write_bytes(stored)


def truncate(path: Path, chance: random.Random) -> None:
    """The end is missing."""
    stored = path.read_bytes()
    path.write_bytes(stored[: chance.randrange(len(stored))])


def zero(path: Path, chance: random.Random) -> None:
    """A range of zeros."""
    stored, (begin, end) = _range(path, chance)
    path.write_bytes(stored[:begin] + bytes(end - begin) + stored[end:])


def scramble(path: Path, chance: random.Random) -> None:
    """A range of anything."""
    stored, (begin, end) = _range(path, chance)
    path.write_bytes(stored[:begin] + chance.randbytes(end - begin) + stored[end:])


def swap(path: Path, chance: random.Random) -> None:
    """Two ranges change places."""
    stored, (begin, end) = _range(path, chance)
    other = chance.randrange(len(stored) - (end - begin) + 1)
    changed = bytearray(stored)
    changed[begin:end], changed[other : other + end - begin] = (
        stored[other : other + end - begin],
        stored[begin:end],
    )
    path.write_bytes(changed)


def repeat(path: Path, chance: random.Random) -> None:
    """A range once more, in the place of another."""
    stored, (begin, end) = _range(path, chance)
    other = chance.randrange(len(stored) - (end - begin) + 1)
    changed = bytearray(stored)
    changed[other : other + end - begin] = stored[begin:end]
    path.write_bytes(changed)


def cut_out(path: Path, chance: random.Random) -> None:
    """A range is missing, and the rest follows."""
    stored, (begin, end) = _range(path, chance)
    path.write_bytes(stored[:begin] + stored[end:])


def change_number(path: Path, chance: random.Random) -> None:
    """One number of a dataset is another."""
    with h5py.File(path, "r+") as file:
        dataset = file[chance.choice([n for n in _datasets(file) if file[n].dtype.kind in "iuf"])]
        if dataset.size:
            where = tuple(chance.randrange(length) for length in dataset.shape)
            dataset[where] = chance.choice((0, 1, 2, 3, 17))


def swap_rows(path: Path, chance: random.Random) -> None:
    """Two rows of all datasets that are as long change places."""
    with h5py.File(path, "r+") as file:
        length = len(file[_row_dataset(file)])
        a, b = chance.randrange(length), chance.randrange(length)
        for name in _datasets(file):
            if file[name].shape and len(file[name]) == length and file[name].dtype.kind in "iuf":
                file[name][a], file[name][b] = file[name][b], file[name][a]


def remove(path: Path, chance: random.Random) -> None:
    """A dataset or a group is missing."""
    with h5py.File(path, "r+") as file:
        del file[chance.choice(_objects(file))]


def exchange(path: Path, chance: random.Random) -> None:
    """Two datasets have each other's names."""
    with h5py.File(path, "r+") as file:
        a, b = chance.choice(_datasets(file)), chance.choice(_datasets(file))
        if a != b:
            file.move(a, "aside")
            file.move(b, a)
            file.move("aside", b)


def reshape(path: Path, chance: random.Random) -> None:
    """A dataset of other dimensions, with the same numbers where there are some."""
    with h5py.File(path, "r+") as file:
        name = chance.choice(_datasets(file))
        values = file[name][()]
        del file[name]
        shape = chance.choice((0, 1, 2, 7, 64))
        file[name] = np.resize(values, shape) if shape else np.ravel(values)[:0]


def retype(path: Path, chance: random.Random) -> None:
    """A dataset of another kind: a scalar, a text, a compound, bits, numbers of other length."""
    with h5py.File(path, "r+") as file:
        name = chance.choice(_datasets(file))
        values = file[name][()]
        del file[name]
        others: tuple[object, ...] = (
            np.float64(3.0),
            "a text",
            np.zeros(3, dtype=[("a", "<i8"), ("b", "<f4")]),
            np.zeros(4, dtype=h5py.opaque_dtype(np.dtype("V8"))),
            h5py.Empty("f8"),
            np.array(["a", "b"], dtype=h5py.string_dtype()),
            np.zeros((4, 4), dtype=">f2"),
            _as(values, ">f8"),
            _as(values, "<i4"),
        )
        file[name] = chance.choice(others)


def declare_much(path: Path, chance: random.Random) -> None:
    """A dataset of far more numbers than the file has."""
    with h5py.File(path, "r+") as file:
        name = chance.choice(_datasets(file))
        dtype, shape = file[name].dtype, file[name].shape
        if dtype.kind not in "iuf":
            return
        del file[name]
        long = (1 << chance.choice((20, 31, 40, 60)), *shape[1:])
        chunks = (min(long[0], 1 << chance.choice((10, 20, 28))), *shape[1:])
        file.create_dataset(name, long, dtype, chunks=chance.choice((chunks, True)), maxshape=long)


def link(path: Path, chance: random.Random) -> None:
    """A link, to itself, to another dataset, around, or to another file."""
    with h5py.File(path, "r+") as file:
        name, other = chance.choice(_objects(file)), chance.choice(_objects(file))
        target = file[other]
        del file[name]
        links = (
            h5py.SoftLink(f"/{name}"),
            h5py.SoftLink(f"/{other}"),
            h5py.ExternalLink("/etc/passwd", "/"),
            h5py.ExternalLink(path.name, f"/{other}"),
            target,
        )
        file[name] = chance.choice(links)


def change_attribute(path: Path, chance: random.Random) -> None:
    """An attribute is another, of another kind, or missing."""
    with h5py.File(path, "r+") as file:
        name = chance.choice(list(file.attrs))
        others: tuple[object, ...] = (
            0, 2, 3, 4, -1, 2**62, "open", "complete", np.bytes_("complete"), np.bytes_("geffect"),
            np.zeros(3), np.bytes_(b"\xff\xfe"), h5py.Empty("f8"), "x" * 1000,
        )  # fmt: skip
        del file.attrs[name]
        if chance.random() < 0.9:
            file.attrs[name] = chance.choice(others)


DAMAGES: tuple[Damage, ...] = (
    flip_bits, flip_bits, truncate, zero, zero, scramble, swap, swap, repeat, cut_out,
    change_number, change_number, swap_rows, remove, exchange, reshape, retype, declare_much,
    link, change_attribute,
)  # fmt: skip


def pad(path: Path, chance: random.Random) -> None:
    """Bytes behind the end."""
    with path.open("ab") as stream:
        stream.write(chance.choice((bytes, chance.randbytes))(chance.randrange(1, 5000)))


def repack(path: Path, chance: random.Random) -> None:
    """All of it in another file, laid out anew."""
    anew = path.with_suffix(".anew")
    with h5py.File(path) as old, h5py.File(anew, "w", libver=chance.choice(("v108", None))) as new:
        for name in chance.sample(sorted(old), len(old)):
            old.copy(name, new)
        for name, value in old.attrs.items():
            new.attrs.create(name, value, dtype=old.attrs.get_id(name).dtype)
    anew.replace(path)


HARMLESS: tuple[Damage, ...] = (pad, repack)


def _range(path: Path, chance: random.Random) -> tuple[bytes, tuple[int, int]]:
    stored = path.read_bytes()
    length = min(len(stored), int(2 ** chance.uniform(0, 13)))
    begin = chance.randrange(len(stored) - length + 1)
    if chance.random() < 0.5:  # as disks lose them
        begin = begin // 512 * 512
    return stored, (begin, begin + length)


def _as(values: object, dtype: str) -> object:
    found = np.asarray(values)
    return found.astype(dtype) if found.dtype.kind in "iufb" else np.zeros(2, dtype)


def _objects(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visit(found.append)
    return sorted(name for name in found if not name.startswith("gradients"))


def _datasets(file: h5py.File) -> list[str]:
    return [name for name in _objects(file) if isinstance(file[name], h5py.Dataset)]


def _row_dataset(file: h5py.File) -> str:
    return "gram" if "gram" in file else "keys"
