"""The global heap of an HDF5 file, read without HDF5, which damage there hangs or crashes.

Texts of any length lie in it, of a view of other files where these are, and of the dimensions of
a dataset the addresses of their labels.

A dataset of such texts has, for each, its length, the address of a collection of the global heap,
and the number of an object there. A collection begins with its size; so does each object, and these
are what damage leaves without an end. Of the objects and bytes, no more are read than a file of its
size has.
"""

import struct
from math import prod
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .lookup3 import lookup3

_REFERENCE = struct.Struct("<IQI")  # length, address, object
_COLLECTION = struct.Struct("<4sB3xQ")  # "GCOL", version, size
_OBJECT = struct.Struct("<HHIQ")  # number, references, nothing, size

_BEGIN, _SLAB = b"GCOL\1", 1 << 18

_VIEWS = (b"\0", b"\1")
"""The first byte of what says where a view is from, its version; no text begins with one."""

_HASH, _ADDRESS = struct.Struct("<I"), struct.Struct("<Q")

Places = dict[int, tuple[int, int]]
"""From where to where in the file each object of a collection lies."""


def texts(
    stream: BinaryIO, size: int, offset: int, shape: tuple[int, ...], *, base: int
) -> NDArray[np.object_]:
    """The texts of a dataset that begins at `offset` of a file; addresses count from `base` on."""
    if prod(shape) * _REFERENCE.size > size:
        raise ValueError(f"{prod(shape)} texts, for which the file has no room")
    whole = _read(stream, offset, prod(shape) * _REFERENCE.size)
    collections: dict[int, Places] = {}
    found: list[str] = []
    room, spare = size, size  # for texts, and for collections: none lies twice in a file
    for length, address, number in _REFERENCE.iter_unpack(whole):
        if not length:
            found.append("")
            continue
        if address not in collections:
            collections[address], taken = _places(stream, spare, base + address)
            spare -= taken
        begin, end = collections[address].get(number, (0, 0))
        room -= length
        if length > end - begin or room < 0:
            raise ValueError(f"a text of {length} bytes, which are not there")
        found.append(_read(stream, begin, length).decode())
    values = np.empty(len(found), dtype=object)
    values[:] = found
    return values.reshape(shape)


def check(stream: BinaryIO, size: int) -> None:
    """Refuse a file with a heap in which HDF5 would search without an end, or read beyond one.

    HDF5 looks into heaps also where no text is read, for the views of other files. It compares the
    hash of what it finds there only after it has believed it.
    """
    begin = 0
    while begin < size:
        stream.seek(begin)
        slab = stream.read(_SLAB)
        at = slab.find(_BEGIN)
        while at >= 0:
            _check_collection(stream, size, begin + at)
            at = slab.find(_BEGIN, at + 1)
        begin += _SLAB - len(_BEGIN)


def _check_collection(stream: BinaryIO, size: int, address: int) -> None:
    if address + _COLLECTION.size > size:
        return
    _, _, length = _COLLECTION.unpack(_read(stream, address, _COLLECTION.size))
    if length > size - address:  # HDF5 itself refuses these
        return
    for begin, end in _places(stream, size, address)[0].values():
        found = _read(stream, begin, end - begin)
        may_be_view = found[:1] in _VIEWS and not _are_addresses(found, size)
        if may_be_view and not _bears_its_hash(found):
            raise ValueError("a view of other files that is not what was written")


def _are_addresses(found: bytes, size: int) -> bool:
    """Whether these bytes can be places in a file of this size; names of files are larger."""
    whole = len(found) % _ADDRESS.size == 0
    return whole and all(address < size for (address,) in _ADDRESS.iter_unpack(found))


def _bears_its_hash(found: bytes) -> bool:
    told, by = found[: -_HASH.size], found[-_HASH.size :]
    return len(by) == _HASH.size and lookup3(told) == _HASH.unpack(by)[0]


def _places(stream: BinaryIO, most: int, address: int) -> tuple[Places, int]:
    """The objects of a collection, and its size, which is at most `most`."""
    mark, version, length = _COLLECTION.unpack(_read(stream, address, _COLLECTION.size))
    if mark != b"GCOL" or version != 1 or length > most:
        raise ValueError("no texts where they should be")
    whole = _read(stream, address, length)
    places: Places = {}
    at = _COLLECTION.size
    while at + _OBJECT.size <= length:
        number, _, _, count = _OBJECT.unpack_from(whole, at)
        begin = at + _OBJECT.size
        if not number:  # free, with this head: HDF5 searches on behind it
            if not _OBJECT.size <= count <= length - at:
                raise ValueError("a heap that has no end")
            at += count
            continue
        if begin + count > length or number in places:
            raise ValueError("texts that have no end")
        places[number] = (address + begin, address + begin + count)
        at = begin + -(-count // 8) * 8
    return places, length


def _read(stream: BinaryIO, offset: int, count: int) -> bytes:
    stream.seek(offset)
    found = stream.read(count)
    if len(found) < count:
        raise ValueError(f"{count} bytes at {offset}, beyond the end of the file")
    return found
