"""Where a rectifier acts: on the gradient, before the optimizer, or on the optimizer's own step.

Both spaces are vectors along which the parameters go down, one tensor a parameter; both are changed
where they stand. Of a sharded parameter a process sees, and changes, the part that it holds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import EllipsisType
from typing import Protocol, Self

import torch
from torch import Tensor

from geffect import distributed
from geffect.interrupts import Once
from geffect.optimizers import moved_by

PART = 2**16
"""Coordinates to look at at a time: few enough for one operation to find them in the cache of a CPU
where another one has left them, with all that is made of them."""

Source = tuple[Tensor, Tensor | None]
"""The direction is what lies in the first tensor, or what the second one has that it has not."""

Where = slice | EllipsisType
"""A part of a parameter: some of its rows, or all of it."""


class Space(Protocol):
    """A direction of descent that can be read and changed, one part of a parameter at a time."""

    def begin(self) -> None:
        """Changes begin, or begin anew after an interrupt."""

    @property
    def rounds(self) -> bool:
        """Whether what is written may differ from what was asked for by more than float32."""

    def parts(self, i: int) -> Iterable[Where]:
        """The parts of parameter i; none where it does not move."""

    def direction(self, i: int, where: Where) -> Tensor:
        """The direction of a part."""

    def replace(self, i: int, where: Where, x: Tensor, changed: Tensor) -> None:
        """Make it x where `changed` is 1, and leave the rest, where it is 0, as it is."""

    def combine(
        self, i: int, where: Where, own: float, terms: Iterable[tuple[float, Tensor]]
    ) -> None:
        """Make it `own` times itself plus the weighted tensors."""

    def rounded(self, i: int, where: Where, x: Tensor) -> Tensor:
        """What is left of x, in float32 or better, once it is written into a part."""

    def write(self, i: int, where: Where, x: Tensor) -> None:
        """Make it x, rounded once."""

    def source(self, i: int) -> Source | None:
        """Where a kernel finds the direction of parameter i; None where it takes more than that."""

    def change(self, i: int, change: Callable[[], object]) -> None:
        """Make a change that a kernel makes of all of parameter i; made twice, it is the same."""


class GradientSpace:
    """The gradient in `.grad` of what moves, by the indices of the parameters.

    It is `scale` times too large where a GradScaler is at work.
    """

    def __init__(self, parameters: Mapping[int, Tensor], scale: float = 1.0) -> None:
        self._parameters, self._scale = parameters, scale

    def begin(self) -> None:
        pass  # what is interrupted is put back

    @property
    def rounds(self) -> bool:
        return any(map(is_half, (p.grad for p in self._parameters.values() if p.grad is not None)))

    def parts(self, i: int) -> Iterable[Where]:
        parameter = self._parameters.get(i)
        if parameter is None or parameter.grad is None:
            return ()
        return [...] if self._scale == 1.0 else parts_of(self._grad(i))

    def direction(self, i: int, where: Where) -> Tensor:
        part = self._grad(i)[where]
        return part if self._scale == 1.0 else part / self._scale

    def replace(self, i: int, where: Where, x: Tensor, changed: Tensor) -> None:
        self._grad(i)[where].copy_(x if self._scale == 1.0 else x * self._scale)

    def combine(
        self, i: int, where: Where, own: float, terms: Iterable[tuple[float, Tensor]]
    ) -> None:
        grad = self._grad(i)[where]
        if own != 1.0:
            grad.mul_(own)
        for weight, tensor in terms:
            grad.add_(tensor, alpha=weight * self._scale)

    def rounded(self, i: int, where: Where, x: Tensor) -> Tensor:
        return widened((x * self._scale).to(self._grad(i).dtype)) / self._scale

    def write(self, i: int, where: Where, x: Tensor) -> None:
        self._grad(i)[where].copy_(x * self._scale)

    def source(self, i: int) -> Source | None:
        return (self._grad(i).detach(), None) if self._scale == 1.0 else None

    def change(self, i: int, change: Callable[[], object]) -> None:
        change()

    def _grad(self, i: int) -> Tensor:
        grad = self._parameters[i].grad
        assert grad is not None
        return distributed.local(grad)


class UpdateSpace:
    """The step that an optimizer has taken: theta before minus theta after.

    `before` holds the old values of what moves, by the indices of the parameters. A coordinate
    whose direction becomes zero has its old value back, bit for bit. Changes that are interrupted
    can be begun anew: each is made once.
    """

    def __init__(self, parameters: Mapping[int, Tensor], before: Mapping[int, Tensor]) -> None:
        self._parameters = {i: distributed.local(p.detach()) for i, p in parameters.items()}
        self._before = before
        self._once = Once()

    @classmethod
    def ahead_of(
        cls,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        room: dict[int, Tensor],
    ) -> Self:
        """The step that the optimizer is about to take, with a copy of what it moves.

        The copies are made in the room that those of the step before have taken: on a CPU new
        memory of the model's size costs more than all the rest.
        """
        stepped = {id(parameter) for parameter in moved_by(optimizer)}
        indices = dict(enumerate(parameters))
        before = {}
        for i, parameter in indices.items():
            if id(parameter) in stepped:
                whole = distributed.local(parameter.detach())
                if i not in room:
                    room[i] = torch.empty_like(whole)
                before[i] = room[i].copy_(whole)
        return cls(indices, before)

    def begin(self) -> None:
        self._once.begin()

    @property
    def rounds(self) -> bool:
        return any(is_half(self._parameters[i]) for i in self._before)

    def parts(self, i: int) -> Iterable[Where]:
        return parts_of(self._parameters[i]) if i in self._before else ()

    def direction(self, i: int, where: Where) -> Tensor:
        # In half precision the difference of two numbers has more digits than either.
        return widened(self._before[i][where]) - widened(self._parameters[i][where])

    def replace(self, i: int, where: Where, x: Tensor, changed: Tensor) -> None:
        after = self._parameters[i][where]
        new = (widened(self._before[i][where]) - x).to(after.dtype)
        # Not torch.where, which takes ten times as long on a CPU: weights of 0 and 1 are exact too.
        self._make(i, partial(after.lerp_, new, changed.to(after.dtype)))

    def combine(
        self, i: int, where: Where, own: float, terms: Iterable[tuple[float, Tensor]]
    ) -> None:
        after = self._parameters[i][where]
        if own != 1.0:
            self._make(i, lambda: after.add_(self.direction(i, where), alpha=1 - own))
        for weight, tensor in terms:
            self._make(i, partial(after.sub_, tensor, alpha=weight))

    def rounded(self, i: int, where: Where, x: Tensor) -> Tensor:
        before = widened(self._before[i][where])
        return before - widened((before - x).to(self._parameters[i].dtype))

    def write(self, i: int, where: Where, x: Tensor) -> None:
        after = self._parameters[i][where]
        self._make(i, partial(after.copy_, widened(self._before[i][where]) - x))

    def source(self, i: int) -> Source | None:
        return self._parameters[i], self._before[i]

    def change(self, i: int, change: Callable[[], object]) -> None:
        self._make(i, change)

    def undo(self) -> None:
        """Take the whole step back."""
        for i, before in self._before.items():
            self._parameters[i].copy_(before)

    def _make(self, i: int, change: Callable[[], object]) -> None:
        self._once.make(i, self._parameters[i], change)


def parts_of(tensor: Tensor) -> Iterable[Where]:
    """Some rows at a time of what lies on a CPU and is large."""
    if tensor.device.type != "cpu" or tensor.numel() <= PART:
        return [...]
    rows = max(1, PART * len(tensor) // tensor.numel())
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def is_half(tensor: Tensor) -> bool:
    """Whether the tensor has fewer digits than float32."""
    return tensor.dtype not in (torch.float32, torch.float64)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def copied(parameter: Tensor) -> Tensor:
    """A copy of what this process holds of a parameter."""
    return distributed.local(parameter.detach()).clone()
