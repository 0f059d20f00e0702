"""The row of the step that moves the parameters now: it is written once what moves is known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect.optimizers import moved_by
from geffect.steps import StepFollower

from .window import Window


class PendingRow:
    """A window of gradients whose step lasts, up to the next gradient; and what the step moves.

    With `updates` a copy of the parameters is kept as long.
    """

    def __init__(self, parameters: Sequence[Tensor], *, updates: bool) -> None:
        self._window: Window | None = None
        self._follower = StepFollower(parameters, updates=updates)

    @property
    def inside(self) -> bool:
        """Whether an optimizer is inside of its step, or raised there."""
        return self._follower.inside

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer steps any of the parameters."""
        return self._follower.owns(optimizer)

    def begin(self, window: Window) -> None:
        """The gradients of the window lie in `.grad`, and a step of them comes."""
        if window.leftover is not None:
            window.leftover.note()
        self._follower.begin()
        self._window = window

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """The step of an optimizer begins, by the gradient of the window alone."""
        self._check_alone(optimizer)
        self._follower.enter(optimizer)

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """The step of an optimizer has ended, and with it perhaps all that there is to write."""
        self._follower.leave(optimizer)
        try:
            self._check_alone(optimizer)  # a closure may have taken the gradient
        except ValueError:
            self.end()
            raise
        if self._window is not None and self._follower.ready:
            self.write(at_gradient=False)
            if self._follower.final:
                self.end()

    def write(self, *, at_gradient: bool) -> None:
        """Write the row, or what is news in it."""
        if self._window is not None:
            move = self._follower.news(at_gradient=at_gradient)
            if move is not None:
                self._window.write(move)

    def end(self) -> None:
        """Let go of the step."""
        self._window = None
        self._follower.end()

    def _check_alone(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step by more than the gradient that the row is of."""
        leftover = None if self._window is None else self._window.leftover
        if leftover is not None and leftover.is_in(moved_by(optimizer)):
            raise ValueError(
                "An optimizer should step by the gradient that was recorded. Found one of an "
                "earlier backward in `.grad` too, so that the step is by their sum. Call "
                "model.zero_grad() before; pass micro-batches with accumulate=True, and a further "
                "term as one of the losses of `objective`."
            )
