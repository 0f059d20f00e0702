"""The place of a run file: whether it can be taken, and what others have left there."""

import errno
import os
from pathlib import Path

import h5py

from geffect.drafts import LONGER, draft_of

from .contiguous import OPTIONS
from .origin import described, is_empty, is_run
from .outside import check_folder
from .reader import open_run
from .schema import RunFileError
from .segments import Segments, folder_of
from .shards import segments_in

LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that has no locks."""


def check_place(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a place where a run file cannot be written, or would hurt what is there."""
    if overwrite and resume:
        raise ValueError(
            "`overwrite` and `resume` should not both be True. Found both. "
            "Choose whether the file is replaced or continued."
        )
    _check_folder_of_file(path.parent)
    _check_name(path)
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise FileExistsError(
            f"The place of a run file should be free, or that of a file. Found {found} at "
            f"`{path}`. Choose another name."
        )
    if path.exists() and not (overwrite or resume):
        raise FileExistsError(
            f"A new run file should not exist yet. Found `{path}`. Choose another name, "
            "continue it with resume=True, or replace it with overwrite=True."
        )
    if not resume:
        check_replaceable(path, overwrite=overwrite)
    _check_folder_of_gradients(path)
    check_free(path)
    _check_file_system(path)


def check_replaceable(path: Path, *, overwrite: bool, begun: Segments | None = None) -> None:
    """Refuse to replace anything but a run file, and gradients beside it that are not its own.

    With `begun`, those of the run that is to be there, further ranks may have written some already.
    """
    if overwrite and path.exists() and not (is_run(path) or is_empty(path)):
        raise FileExistsError(
            f"`overwrite` should find a run file of geffect to replace. Found {described(path)}, "
            f"at `{path}`. Choose another name; or remove that file, if nobody needs it."
        )
    check_free(path)
    _check_gradients(path, overwrite=overwrite, begun=begun)


def _check_folder_of_file(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder of a run file should exist. Found no folder `{folder}`. Create it."
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"The folder of a run file should be writable. Found `{folder}`, which is not. "
            "Choose another folder."
        )


def _check_name(path: Path) -> None:
    if path.suffix.casefold() == ".gradients":
        raise ValueError(
            "The name of a run file should not end in `.gradients`, as the folder beside it does "
            f"that holds its gradients. Found `{path.name}`. Choose another name, such as "
            f"`{path.stem}.h5`."
        )
    length = len(os.fsencode(path.name))
    most = os.pathconf(path.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if length + LONGER > most:
        raise ValueError(
            f"The name of a run file should have at most {most - LONGER} bytes, since a draft of "
            f"it has a longer one. Found {length}. Choose a shorter name."
        )


def _check_folder_of_gradients(path: Path) -> None:
    folder = folder_of(path)
    try:
        check_folder(folder)
    except OSError as error:
        raise FileExistsError(
            f"The folder with the gradients of a run should be a folder of its own. Found a link "
            f"or a file at `{folder}`. Choose another name, or move that away."
        ) from error


def _check_gradients(path: Path, *, overwrite: bool, begun: Segments | None) -> None:
    """Refuse a place beside which the gradients of another run lie: they would be lost."""
    folder = folder_of(path)
    found = segments_in(folder)
    if begun is not None:  # this process, rank 0, has written nothing of it yet
        found -= {name for name in begun.own(path, found) if not name.endswith(".rank0.h5")}
    if not found:
        return
    if not overwrite:
        raise FileExistsError(
            "A new run should not find gradients of another one beside it. Found segments in "
            f"`{folder}`. Choose another name, remove that folder, or pass overwrite=True if "
            f"`{path.name}` is the run that they belong to."
        )
    if strange := sorted(found - _owned(path, found)):
        raise FileExistsError(
            "`overwrite` should find no other gradients than those of the run that it replaces. "
            f"Found {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''} in `{folder}`, "
            f"which `{path}` does not count as its own. Choose another name, or remove that folder."
        )


def _owned(path: Path, found: set[str]) -> set[str]:
    """Those of the run in this file; of what it had begun, without a row that counts, also one."""
    try:
        run = open_run(path)
        if run.contents.gradients is None:
            return set()
        rows = int(run.read("stored").max(initial=-1)) + 1
        return run.segments().own(path, found, rows)
    except OSError:  # no file, or none that says what is its own
        return set()


def _check_file_system(path: Path) -> None:
    """Make and lock a file of the same kind: what cannot be done is said now, not after a step."""
    try:
        with draft_of(path) as draft:
            draft.unlink()  # of one that is locked HDF5 takes no lock
            h5py.File(draft, "x", **OPTIONS).close()
    except OSError as error:
        if error.errno in LOCKS:
            raise RunFileError(
                f"The file system of `{path}` should lock files. Found that it does not: {error}. "
                "Set HDF5_USE_FILE_LOCKING=FALSE in the environment before Python starts, and let "
                "no two processes write this file; or record on another disk."
            ) from error
        raise RunFileError(
            f"A run file should be possible at `{path}`. Found: {error}. Choose another name or "
            "another folder."
        ) from error


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


def refuse_to_replace(draft: Path, path: Path) -> None:
    """Take the place of a file that is not there, or raise a FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without links: a look instead.
        if path.exists():
            raise FileExistsError(path) from None
