"""What a rectifier remembers of the retain gradients that it has seen."""

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Vector

SECOND_MOMENT_DECAY = 0.999


class RetainMemory:
    """The running average of the retain gradient, and of its square where that is wanted.

    average <- weight r + (1 - weight) average, started at the first gradient (arXiv 2503.09117; its
    gamma weighs the new gradient, the opposite of momentum). Float32. A parameter that no retain
    loss has reached yet has None.
    """

    def __init__(self, weight: float, *, second_moment: bool) -> None:
        self.weight = weight
        self.average: list[Tensor | None] = []
        self._squares: list[Tensor | None] | None = [] if second_moment else None
        self._count = 0

    def update(self, gradient: Vector) -> str | None:
        """Take in one gradient, or say why it is left out."""
        # The largest entry tells, and unlike a sum of squares it neither under- nor overflows.
        largest = [
            torch.linalg.vector_norm(part, torch.inf).float()
            for part in (distributed.local(tensor) for tensor in gradient if tensor is not None)
            if part.numel()
        ]
        peak = (
            torch.stack([x.to(largest[0].device) for x in largest]).max().item() if largest else 0.0
        )
        peak = distributed.largest(peak)
        if peak == 0.0:
            return "zero"
        if not peak < float("inf"):
            return "not finite"
        first = self._count == 0
        self._count += 1
        self.average = _mixed(self.average, gradient, 1.0 if first else self.weight)
        if self._squares is not None:
            squares = [None if tensor is None else tensor.float() ** 2 for tensor in gradient]
            self._squares = _mixed(self._squares, squares, 1 - SECOND_MOMENT_DECAY)
        return None

    def second_moment(self) -> list[Tensor | None]:
        """The running mean square, with the bias of its start at zero taken out."""
        assert self._squares is not None
        correction = 1 - SECOND_MOMENT_DECAY**self._count
        return [None if square is None else square / correction for square in self._squares]


def _mixed(state: list[Tensor | None], new: Vector, weight: float) -> list[Tensor | None]:
    """(1 - weight) state + weight new, in place where there is a state; None stands for zero."""
    mixed: list[Tensor | None] = []
    for old, tensor in zip(state or [None] * len(new), new, strict=True):
        if tensor is None:
            mixed.append(None if old is None else old.mul_(1 - weight))
        elif old is None:
            mixed.append(tensor.detach().to(torch.float32, copy=True).mul_(weight))
        else:
            mixed.append(old.lerp_(tensor.detach().float(), weight))
    return mixed
