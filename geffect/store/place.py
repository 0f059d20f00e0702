"""The place of a run file: whether it can be taken, and what others have left there."""

import os
import re
from pathlib import Path

import h5py

from .schema import RunFileError
from .segments import folder_of
from .shards import has_segments


def check_place(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a place where a run file cannot be written, or would hurt what is there."""
    if overwrite and resume:
        raise ValueError(
            "`overwrite` and `resume` should not both be True. Found both. "
            "Choose whether the file is replaced or continued."
        )
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder of a run file should exist. Found no folder `{folder}`. Create it."
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"The folder of a run file should be writable. Found `{folder}`, which is not. "
            "Choose another folder."
        )
    if path.exists() and not (overwrite or resume):
        raise FileExistsError(
            f"A new run file should not exist yet. Found `{path}`. Choose another name, "
            "continue it with resume=True, or replace it with overwrite=True."
        )
    if has_segments(folder_of(path)) and not (overwrite or resume):
        raise FileExistsError(
            "A new run should not find gradients of another one beside it. Found segments in "
            f"`{folder_of(path)}`. Choose another name, remove that folder, or pass "
            "overwrite=True."
        )
    check_free(path)


def check_free(path: Path) -> None:
    """Refuse a file that another process is writing: it holds the lock of HDF5."""
    try:
        h5py.File(path, "r").close()
    except BlockingIOError as error:
        raise in_use(path) from error
    except OSError:
        pass  # There is no file, or one that no recorder is writing.


def in_use(path: Path) -> RunFileError:
    """What is said of a file that another process is writing."""
    return RunFileError(
        f"A run file should have one writer. Found that `{path}` is being written, or "
        "kept open, by another process. End that one first, or choose another name."
    )


def sweep(path: Path) -> None:
    """Remove what killed writers of this file, which is ours now, left half made."""
    own = re.compile(re.escape(f".{path.name}.") + r"\d+\.draft")
    for draft in path.parent.iterdir():
        if own.fullmatch(draft.name):
            draft.unlink(missing_ok=True)


def refuse_to_replace(draft: Path, path: Path) -> None:
    """Take the place of a file that is not there, or raise a FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without links: a look instead.
        if path.exists():
            raise FileExistsError(path) from None
