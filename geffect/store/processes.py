"""The process that a run is written by: one that was forked from it leaves the run alone."""

import os
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import h5py

from .schema import RunFileError


class Holder(Protocol):
    """What keeps an HDF5 file open for writing; None where it has let go."""

    @property
    def held(self) -> h5py.File | None:
        """The file."""


_holders: "WeakSet[Holder]" = WeakSet()


class Home:
    """The process in which this was made."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process

    def check(self, path: Path) -> None:
        """Refuse to go on in another process."""
        if not self.is_here:
            raise RunFileError(
                f"`{path}` should be written by the process that opened it, {self._process}. Found "
                f"process {os.getpid()}, forked from it. Record there alone, or make a recorder of "
                "another file here."
            )


def not_inherited(holder: Holder) -> None:
    """See to it that a forked process, which HDF5 would close the file in, cannot touch it."""
    _holders.add(holder)


def _let_go_in_child() -> None:
    # The lock of a file is that of both processes: given back here it would be lost there.
    for holder in list(_holders):
        if holder.held:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, holder.held.id.get_vfd_handle())
            os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
