"""What an interrupt leaves whole: an error or a signal may come between any two lines."""

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def to_the_end(action: Callable[[], None]) -> None:
    """Do something that may be begun anew; an interrupt in its midst waits until it is done."""
    try:
        action()
    except BaseException:
        action()
        raise


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
        put_back()
        raise
