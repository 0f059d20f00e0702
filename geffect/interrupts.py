"""What an interrupt leaves whole: an error or a signal may come between any two lines."""

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

Found = TypeVar("Found")


def to_the_end(action: Callable[[], None]) -> None:
    """Do something that may be begun anew; interrupts in its midst wait until it is done.

    An error that comes a second time is raised where it came.
    """
    try:
        action()
    except Exception:
        action()
        raise
    except BaseException:
        to_the_end(action)
        raise


def interrupt_behind(error: BaseException, handled: BaseException | None) -> BaseException | None:
    """The interrupt that C code made an error of, as HDF5 does; None where none came.

    `handled` is what was on its way before, which has nothing to do with it.

    >>> error = SystemError("returned a result with an exception set")
    >>> error.__cause__ = KeyboardInterrupt()
    >>> interrupt_behind(error, None)
    KeyboardInterrupt()
    """
    found: BaseException | None = error
    while found is not None and found is not handled:
        if not isinstance(found, Exception):
            return found
        found = found.__cause__ or found.__context__
    return None


def put_back_after(body: Callable[[], Found], put_back: Callable[[], None]) -> Found:
    """What the body returns; whatever it raises, what it changed is put back.

    `put_back` may be called twice, and does the same then: an interrupt in its midst is raised when
    the second time has come to its end. A function, not a context manager, whose own lines an
    interrupt would find unguarded.

    >>> changed = [1]
    >>> put_back_after(lambda: changed.append(2), lambda: changed.__delitem__(slice(1, None)))
    >>> changed
    [1]
    """
    try:
        try:
            return body()
        finally:
            put_back()
    except BaseException:
        to_the_end(put_back)
        raise


class Versioned(Protocol):
    """A tensor, of whose changes torch keeps count."""

    @property
    def _version(self) -> int: ...


class Once:
    """Changes in place that an action makes in one order; begun anew, it makes none a second time.

    What is changed and what is not is told by the version that torch counts of every tensor.

    >>> import torch
    >>> tensor, once = torch.zeros(1), Once()
    >>> for _ in range(2):
    ...     once.begin()
    ...     once.make("tensor", tensor, lambda: tensor.add_(1.0))
    >>> tensor
    tensor([1.])
    """

    def __init__(self) -> None:
        self._come: dict[Hashable, int] = {}
        self._last: dict[Hashable, tuple[int, int]] = {}

    def begin(self) -> None:
        """The action begins, for the first time or anew."""
        self._come = {}

    def make(self, key: Hashable, tensor: Versioned, change: Callable[[], object]) -> None:
        """Make the next change of the tensor of this key, unless it was made already."""
        place = self._come[key] = self._come.get(key, 0) + 1
        last, version = self._last.get(key, (0, -1))
        if place < last or (place == last and tensor._version != version):
            return
        self._last[key] = place, tensor._version
        change()
