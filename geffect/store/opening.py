"""Opening a run file for reading: whatever is wrong with it is one error that names it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .bounds import BoundedFile, read_hdf5
from .checksums import Changed
from .origin import SEGMENT
from .schema import FORMAT, READABLE, STATES, VERSION, ChecksumError, RunFileError

TRIES, PAUSE = 4, 0.02

Found = TypeVar("Found")


@contextmanager
def opened(path: Path) -> Iterator[BoundedFile]:
    """The run file, checked to be one. What fails inside is a RunFileError."""
    if not path.is_file():
        other = "a folder" if path.is_dir() else "a pipe or a device"
        found = other if path.exists() else "nothing"
        raise FileNotFoundError(
            f"A run file should exist. Found {found} at `{path}`. Check the path; a recorder makes "
            "its file with the first step."
        )
    should = f"`{path}` should be a run file of geffect, format {VERSION}."
    again = "Take an earlier copy, or record again."
    is_hdf5 = closed = False
    try:
        with read_hdf5(path) as file:
            is_hdf5 = True
            _check_format(file, should)
            try:
                yield file
            except Changed:
                closed = file.attribute("state") == STATES[True]
                raise
    except (RunFileError, PermissionError):
        raise
    except Changed as error:
        raise ChecksumError(
            f"`{path}` should hold what was written there. Found {error} with another checksum. "
            f"See `geffect validate` for all that changed. {again}",
            str(error),
            closed=closed,
        ) from error
    # Of damage HDF5 and h5py make errors of every kind, also of those that stand for mistakes.
    except Exception as error:
        found = (
            "one that lacks a part, or holds another in its place"
            if is_hdf5
            else "a file that is not HDF5, or that is cut off"
        )
        raise RunFileError(f"{should} Found {found}: {_said(error)}. {again}") from error


def settled(read: Callable[[], Found]) -> Found:
    """What `read` finds when nothing is written meanwhile: a row may be, for a moment."""
    for _ in range(TRIES - 1):
        try:
            return read()
        except ChecksumError as error:
            if error.closed:
                raise
            time.sleep(PAUSE)
    return read()


def _check_format(file: BoundedFile, should: str) -> None:
    version = file.version
    # In format 2 the word has any length, which is not for HDF5 to read.
    word = FORMAT if version == 2 else file.attribute("format")
    if word != FORMAT or version < 0:
        raise RunFileError(
            f"{should} Found an HDF5 file of another kind, with {file.names()[:5]}. "
            "Pass a file that a Recorder wrote."
        )
    if file.has_attribute(SEGMENT):
        raise RunFileError(
            f"{should} Found a segment with the gradients of one. Pass the run file, as `a.h5` "
            "beside the folder `a.gradients`."
        )
    if version not in READABLE:
        advice = (
            "Update geffect to read it."
            if version > VERSION
            else "Read it with the geffect that wrote it, or record again."
        )
        raise RunFileError(f"{should} Found format {version}. {advice}")


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
