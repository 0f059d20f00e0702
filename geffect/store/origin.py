"""Whether geffect wrote a file, also where it is damaged: nothing else is ever replaced."""

from pathlib import Path

from .bounds import BoundedFile, read_hdf5
from .outside import open_plain
from .schema import FORMAT

RUN, SEGMENT = "state", "encoding"
"""The attribute that a file of either kind has, and the other has not."""

_SIGNATURE, _HEAD = b"\x89HDF\r\n\x1a\n", 1 << 13
"""How HDF5 files begin; and in how many bytes ours have said what they are."""

_RUN = {"committed", "gram", "manifest", "parameters", "steps"}
"""What a run file has at least, in every format."""


def is_empty(path: Path) -> bool:
    """Whether there is nothing in a file that could be lost."""
    return path.is_file() and not path.stat().st_size


def is_run(path: Path) -> bool:
    """Whether a file is a run file of geffect: by its root, else by its head.

    >>> is_run(example_run().path), is_run(Path("README.md"))
    (True, False)
    """
    return _is(path, RUN)


def is_segment(path: Path) -> bool:
    """Whether a file is a segment of stored gradients, likewise."""
    return _is(path, SEGMENT)


def described(path: Path) -> str:
    """What a file is that is no run file, for the reader of an error."""
    if is_segment(path):
        return "a segment with the gradients of a run"
    try:
        with read_hdf5(path) as file:
            return f"an HDF5 file of another kind, with {file.names()[:5]}"
    except Exception:  # HDF5 and h5py make errors of every kind
        return f"another kind of file, with {path.stat().st_size:,} bytes"


def _is(path: Path, kind: str) -> bool:
    try:
        with read_hdf5(path) as file:
            # In format 2 the word has any length, which is not for HDF5 to read.
            return _root_is(file, kind) or (file.version == 2 and _head_is(path, kind))
    except Exception:  # as above
        return _head_is(path, kind)


def _root_is(file: BoundedFile, kind: str) -> bool:
    if file.attribute("format") == FORMAT:
        return file.has_attribute(kind)
    return kind == RUN and set(file.names()) >= _RUN


def _head_is(path: Path, kind: str) -> bool:
    """Whether the first bytes are those of a file that geffect laid out."""
    try:
        with open_plain(path) as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False
    words = (b"format\0", FORMAT.encode(), f"{kind}\0".encode())
    return head.startswith(_SIGNATURE) and all(word in head for word in words)
