"""Agreement: a failure on one process raises on all, and what they say has to be the same."""

import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Self

import torch
from torch import Tensor

from .engine import is_in_engine
from .processes import all_gather, all_reduce, world_size
from .shards import is_sharded


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
    _exchange(here.said, failure, torch.zeros(0, dtype=torch.float64))


Part = Callable[[], Tensor]
"""Gives `Float64[n]`, what this process adds to a sum over all of them."""

Exchange = Callable[[Part], Tensor]
"""Gives the sum, on the CPU."""


def exchange(part: Part) -> Tensor:
    """What the processes add up to, in a reduction of its own; none where there is nothing.

    >>> exchange(lambda: torch.ones(2))
    tensor([1., 1.])
    """
    own = part()
    return own if world_size() == 1 or own.numel() == 0 else all_reduce(own).cpu()


class Agreement:
    """What the processes of a training tell each other of each step, in one reduction.

    It comes after the passes, and before anything is done with what they leave: it tells failures,
    compares what all have to say alike, and sums up what else there is. What all have said alike
    once is not compared before the passes again.

    Where passes wait for those of other processes, as under FSDP2, a process cannot leave them to
    tell of a failure: what goes wrong before they end is raised where it goes wrong. In an engine,
    and where a step or all are `early`, more than gradients is exchanged: all is compared before.
    """

    def __init__(self, *, early: bool = False) -> None:
        self._always_early = early
        self._known: set[str] = set()
        self._room = 0  # numbers that are summed up: as many in each step, whatever it has to tell
        self._said = ""
        self._waits = self._early = self._told = False
        self._failure: Exception | None = None

    @property
    def later(self) -> bool:
        """Whether what goes wrong in the passes of this step is told after them."""
        return not self._early

    @contextmanager
    def step(self, parameters: Sequence[Tensor], *, early: bool = False) -> Iterator[Self]:
        """A block with the passes of a step, and `settle` after them."""
        self._said, self._told, self._failure = "", False, None
        self._waits = any(map(is_sharded, parameters))
        self._early = self._always_early or early or any(map(is_in_engine, parameters))
        try:
            yield self
        except Exception as error:
            if world_size() > 1 and not self._told and self._is_heard:
                self._tell(self._nothing, error)
            raise

    @property
    def _is_heard(self) -> bool:
        """Whether the others come to a reduction next, whatever this process does."""
        if self._early:
            return not self._said
        return not self._waits or not (self._said or self._known)

    def check_same_on_ranks(self, *values: object) -> None:
        """Demand that every process says the same of these, in words."""
        said = repr(values)
        if world_size() > 1 and (self._early or said not in self._known):
            self._tell(self._nothing, said=said)
            self._known.add(said)
            self._told = False
        self._said = said

    def told_after(self, action: Callable[[], object]) -> None:
        """Do what, if it fails, keeps no process from the passes: `settle` tells it."""
        try:
            action()
        except Exception as error:
            if world_size() == 1:
                raise
            self._failure = self._failure or error

    def settle(self, part: Part) -> Tensor:
        """What the processes add up to, where all is well; what `part` raises is told to all."""
        if world_size() == 1:
            return part()
        try:
            if self._failure is not None:
                raise self._failure
            own = part()
        except Exception as error:
            self._tell(self._nothing, error)
            raise
        if len(own) > self._room:
            self._tell(self._nothing)
            self._room = len(own)
        body = self._nothing
        body[: len(own)] = own
        return self._tell(body)[: len(own)]

    @property
    def _nothing(self) -> Tensor:
        return torch.zeros(self._room, dtype=torch.float64)

    def _tell(
        self, body: Tensor, failure: Exception | None = None, said: str | None = None
    ) -> Tensor:
        self._told = True
        return _exchange(self._said if said is None else said, failure, body)


def _exchange(said: str, failure: Exception | None, body: Tensor) -> Tensor:
    """The sum of the bodies, where nothing has failed and all say the same."""
    # Small enough for the sum of squares: all alike where n * sum of squares = square of the sum.
    word = zlib.crc32(said.encode()) % 2**20
    head = torch.tensor([failure is not None, word, word * word], dtype=torch.float64)
    total = all_reduce(torch.cat([head, body])).cpu()
    failed, words, squares = map(int, total[: len(head)].tolist())
    if failed:
        _raise_together(failure)
    if world_size() * squares != words * words:
        raise ValueError(
            "Losses, weights and options of a step should be the same on every process. Found "
            f"{all_gather(said)}. On a process without data of its own, pass 0 * loss."
        )
    return total[len(head) :]


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
