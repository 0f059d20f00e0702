"""Agreement: a failure on one process raises on all, and what they say has to be the same."""

import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from .processes import all_gather, all_reduce, world_size


class Ranks:
    """What a process has to say at the end of a block that all of them run."""

    said = ""

    def check_same_on_ranks(self, *values: object) -> None:
        """Demand that every process says the same of these, in words."""
        self.said = repr(values)


@contextmanager
def raise_on_all_ranks() -> Iterator[Ranks]:
    """A failure inside on one process raises on all of them, so that none is left waiting.

    What they say to be alike is compared. One small reduction, however much is said.

    >>> with raise_on_all_ranks():
    ...     raise FileExistsError("run.h5")
    Traceback (most recent call last):
    FileExistsError: run.h5
    """
    here, failure = Ranks(), None
    try:
        yield here
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    if world_size() == 1:
        return
    # Small enough for the sum of squares: all alike where n * sum of squares = square of the sum.
    word = zlib.crc32(here.said.encode()) % 2**20
    failed, total, squares = all_reduce(
        torch.tensor([int(failure is not None), word, word * word])
    ).tolist()
    if failed:
        _raise_together(failure)
    if world_size() * squares != total * total:
        raise ValueError(
            "Losses, weights and options of a step should be the same on every process. Found "
            f"{all_gather(here.said)}. On a process without data of its own, pass 0 * loss."
        )


def _raise_together(failure: Exception | None) -> NoReturn:
    failures = all_gather(None if failure is None else _sendable(failure))
    if failure is not None:
        raise failure
    culprit, other = next((i, error) for i, error in enumerate(failures) if error is not None)
    other.add_note(f"It was raised on process {culprit}; all processes stop with it.")
    raise other


def _sendable(error: Exception) -> Exception:
    """The error, or what can be said of one that cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
