"""Forward passes that several losses of a step share, where losses are asked one after the other.

A loss that is a function runs the model when it is asked. A `SharedForward` runs each batch once
for all of them, and a `Sharing` knows which losses use what: how long a graph is needed.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geffect.interrupts import put_back_after


@dataclass(eq=False)
class Remembered:
    """What the model returned for a batch, and whether a backward pass has gone through it."""

    inputs: Any  # kept, since an id is only their own while they live
    output: Any
    has_graph: bool
    passed: bool = False
    over: bool = False  # nobody is expected to ask for it again

    def let_go(self) -> None:
        """Forget it: who asks for it runs the model."""
        self.inputs = self.output = None


class Sharing:
    """The forwards that the losses of one step have used so far.

    - `ask` calls a loss and notes what it uses.
    - `holds` says whether a further loss may ask for a forward of the one that was asked last.
    - `pass_made` is told of its backward pass: what that freed is never handed out again.
    """

    def __init__(self) -> None:
        self._known: list[Remembered] = []
        self._used: list[Remembered] = []
        self._is_last = False

    def ask(self, loss: Callable[[], Any], *, is_last: bool) -> Any:
        """What the loss returns; `is_last` if no other one is asked after it.

        What the last one uses is remembered until it returns.
        """
        self._used, self._is_last = [], is_last
        before = _asked.get()

        def run() -> Any:
            _asked.set(self)
            return loss()

        returned = put_back_after(run, lambda: _put_back(before))
        if is_last:
            for one in self._used:
                one.let_go()
        return returned

    @property
    def holds(self) -> bool:
        """Whether the loss that was asked last uses what others may ask for."""
        return bool(self._used) and not self._is_last

    def pass_made(self, *, freed: bool, is_aside: bool) -> None:
        """A backward pass was made of the loss that was asked last.

        A loss beside the objective ends the use of its forward, but for losses that come directly
        behind it.
        """
        for one in self._used:
            one.passed, one.over = True, one.over or is_aside
            if freed:
                one.let_go()
        self._used = []

    def use(self, one: Remembered) -> None:
        """The loss that is asked uses this forward."""
        if one not in self._used:
            self._used.append(one)
        if one not in self._known:
            self._known.append(one)

    def make_room(self) -> None:
        """A forward is about to run: what nobody will ask for again is let go."""
        for one in self._known:
            if one.passed and (one.over or self._is_last):
                one.let_go()


class SharedForward:
    """A model that runs each batch once, for objectives and risks on the same data.

    It remembers what it returned for a batch as long as it lives; make one a step. What was run
    without a graph is run again where a graph is needed. Where losses are functions, what a
    backward pass has freed is forgotten with it, and what no further loss asks for before the next
    forward.

    >>> calls = []
    >>> def model(input_ids): calls.append(1); return input_ids.sum()
    >>> shared, ids = SharedForward(model), torch.ones(2)
    >>> shared(input_ids=ids) is shared(input_ids=ids), len(calls)
    (True, 1)
    """

    def __init__(self, model: Any) -> None:
        self.module = model
        self._remembered: dict[tuple[Any, ...], Remembered] = {}

    def __call__(self, **inputs: Tensor) -> Any:
        """What the model returns for the inputs."""
        # At a relearned copy the model is another one.
        key = (AT_COPY.get(), *((name, id(value)) for name, value in inputs.items()))
        one, sharing = self._remembered.get(key), _asked.get()
        needs_graph = torch.is_grad_enabled()
        if one is None or one.output is None or (needs_graph and not one.has_graph):
            if sharing is not None:
                sharing.make_room()
            one = Remembered(inputs, self.module(**inputs), needs_graph)
            self._remembered[key] = one
        if sharing is not None and needs_graph:
            sharing.use(one)
        return one.output


def check_no_loss_asked() -> None:
    """Refuse a step, of an optimizer or of a recorder, inside of a loss or at a relearned copy.

    >>> Sharing().ask(check_no_loss_asked, is_last=True)
    Traceback (most recent call last):
    RuntimeError: No step should be taken while a loss is asked: ... after the backward pass.
    """
    if _asked.get() is not None:
        raise RuntimeError(
            "No step should be taken while a loss is asked: all losses of a step are taken at the "
            "same parameters. Found an optimizer, a recorder or a rectifier that was called inside "
            "of the function of a loss. Call it after the backward pass."
        )
    if AT_COPY.get() is not None:
        raise RuntimeError(
            "No step should be taken at a relearned copy, whose parameters are gone with its block."
            " Found an optimizer, a recorder, a rectifier or another copy inside of `relearned`. "
            "Take the gradient inside, and step after the block."
        )


AT_COPY: ContextVar[object] = ContextVar("at_copy", default=None)
"""Where parameters have been moved for the gradient of an objective, and will be put back."""

_asked: ContextVar[Sharing | None] = ContextVar("asked", default=None)
"""Of the loss that is being asked."""


def _put_back(before: Sharing | None) -> None:
    _asked.set(before)
