"""Heaps that HDF5 would search without an end, or read beyond the end of, are refused before it."""

import io
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from geffect import Recorder
from geffect.store import heap, open_run
from geffect.store.lookup3 import lookup3

SIZE = 256


def collection(*objects: bytes, reserved: bytes = bytes(3)) -> bytes:
    """A collection of a heap, with zeros behind the objects."""
    head = b"GCOL\1" + reserved + struct.pack("<Q", SIZE)
    return (b"before, " + head + b"".join(objects)).ljust(SIZE + 8, b"\0")


def item(number: int, size: int, content: bytes = b"") -> bytes:
    """An object: its number, its size as it says, and what stands behind that."""
    padded = content.ljust(-(-len(content) // 8) * 8, b"\0")
    return struct.pack("<HHIQ", number, 1, 0, size) + padded


def free(after: int) -> bytes:
    """The rest of a collection after objects of so many bytes."""
    return item(0, SIZE - 16 - after)


def checked(file: bytes) -> None:
    heap.check(io.BytesIO(file), len(file))


TEXT = item(1, 5, b"hello")
TOLD = bytes([0, 1, 0, 0, 0, 0, 0, 0, 0]) + b"a.gradients/000.rank0.h5\0view\0"
VIEW = TOLD + struct.pack("<I", lookup3(TOLD))


@pytest.mark.parametrize(
    "objects",
    [
        [TEXT, free(len(TEXT))],
        [TEXT, item(0, 32, bytes(16)), item(2, 5, b"again"), free(len(TEXT) + 32 + len(TEXT))],
        [item(1, len(VIEW), VIEW), free(len(item(1, len(VIEW), VIEW)))],
        [item(1, 8, struct.pack("<Q", 256)), free(24)],
        [item(1, 16, struct.pack("<2Q", 257, 8)), free(32)],
    ],
    ids=["texts", "free between texts", "a view", "an address", "addresses"],
)
def test_what_is_whole_is_let_through(objects: list[bytes]) -> None:
    checked(collection(*objects))


@pytest.mark.parametrize(
    "objects",
    [
        [TEXT],
        [TEXT, item(0, 32, bytes(16))],
        [TEXT, item(0, 2**64 - 48)],
        [item(1, 2**64 - 16, b"hello")],
        [TEXT, TEXT, free(2 * len(TEXT))],
    ],
    ids=["zeros", "zeros behind what is free", "back by what is free", "back", "twice"],
)
@pytest.mark.parametrize("reserved", [bytes(3), b"\0\7\0"])
def test_what_has_no_end_is_refused(objects: list[bytes], reserved: bytes) -> None:
    with pytest.raises(ValueError, match="no end"):
        checked(collection(*objects, reserved=reserved))


@pytest.mark.parametrize("at", range(len(VIEW)))
def test_a_view_that_is_not_what_was_written_is_refused(at: int) -> None:
    changed = bytearray(VIEW)
    changed[at] ^= 1
    file = collection(item(1, len(VIEW), bytes(changed)), free(len(item(1, len(VIEW), VIEW))))
    with pytest.raises(ValueError, match="not what was written"):
        checked(file)


def test_no_whole_file_is_refused_wherever_its_objects_stand(tmp_path: Path) -> None:
    for count in range(1, 33):
        model = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(count))
        with Recorder(model, tmp_path / f"{count}.h5") as recorder:
            recorder.backward(objective=torch.cat([*model]).sum())
        assert len(open_run(tmp_path / f"{count}.h5").layers) == count
