"""Where a rectifier acts: on the gradient, before the optimizer, or on the optimizer's own step.

Both spaces are vectors along which the parameters go down, one tensor a parameter; both are changed
where they stand, so that no second copy of the model's size is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Space(Protocol):
    """A direction of descent that can be read and changed, one parameter at a time."""

    def direction(self, i: int) -> Tensor | None:
        """The direction of parameter i; None where it does not move."""

    def stop(self, i: int, where: Tensor) -> None:
        """Set the direction to zero at the coordinates of the mask."""

    def combine(self, i: int, own: float, other: float, vector: Tensor) -> None:
        """Replace the direction by `own` times itself plus `other` times the vector."""


class GradientSpace:
    """The gradient in `.grad`."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    def direction(self, i: int) -> Tensor | None:
        return self._parameters[i].grad

    def stop(self, i: int, where: Tensor) -> None:
        grad = self._parameters[i].grad
        assert grad is not None
        grad.masked_fill_(where, 0)

    def combine(self, i: int, own: float, other: float, vector: Tensor) -> None:
        grad = self._parameters[i].grad
        assert grad is not None
        grad.mul_(own).add_(vector.to(grad.dtype), alpha=other)


class UpdateSpace:
    """The step that an optimizer has taken: theta before minus theta after.

    Made before the optimizer steps, read and changed after it. Parameters that the optimizer does
    not step, because they have no gradient or are not among its own, do not move. A coordinate that
    is stopped has its old value back, bit for bit.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters = [parameter.detach() for parameter in parameters]
        self._before = [
            parameter.detach().clone()
            if parameter.grad is not None and id(parameter) in stepped
            else None
            for parameter in parameters
        ]

    def direction(self, i: int) -> Tensor | None:
        before = self._before[i]
        return None if before is None else before - self._parameters[i]

    def stop(self, i: int, where: Tensor) -> None:
        before = self._before[i]
        assert before is not None
        self._parameters[i].copy_(torch.where(where, before, self._parameters[i]))

    def undo(self) -> None:
        """Take the whole step back."""
        for parameter, before in zip(self._parameters, self._before, strict=True):
            if before is not None:
                parameter.copy_(before)

    def combine(self, i: int, own: float, other: float, vector: Tensor) -> None:
        after = self._parameters[i]
        if own != 1.0:
            step = self.direction(i)
            assert step is not None
            after.add_(step, alpha=1 - own)
        after.sub_(vector.to(after.dtype), alpha=other)


def around_step(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> tuple[Any, Any]:
    """Call `before` and `after` around every step of the optimizer; returns the hook handles."""

    def first(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *positional = args  # the first is the optimizer itself
        closure = positional[0] if positional else kwargs.get("closure")
        if closure is not None:
            raise ValueError(
                "`optimizer.step` should be called without a closure when its step is rectified. "
                f"Found a closure given to {type(optimizer).__name__}, which computes gradients "
                'that were never rectified. Use space="gradient", or an optimizer without closure.'
            )
        before()

    def last(*_: object) -> None:
        after()

    return optimizer.register_step_pre_hook(first), optimizer.register_step_post_hook(last)
