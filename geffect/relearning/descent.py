"""The steps by which parameters relearn: down a loss, each of a chosen length."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed, dots
from geffect.beside import beside
from geffect.gradients import Vector, reduced
from geffect.losses import loss_scale, plan

from .place import Place
from .way import Way

LOSS = "relearning"
"""The name of the loss in messages."""

MOST = 2.0**24
"""The largest scale of a loss on its way back: with a larger one float16 keeps no more."""


def relearn(
    model: nn.Module,
    loss: Callable[[], Tensor],
    way: Way,
    place: Place,
    scaler: GradScaler | None,
) -> tuple[float, ...]:
    """Take the steps; the loss before each of them."""
    theta = 1.0 if way.unit == "length" else _norm([p.detach() for p in place.parameters])
    if theta == 0:
        raise ValueError(
            f"The parameters should not all be 0 where `unit` is {way.unit!r}. Found that their "
            'norm is 0. Pass a radius with unit="length".'
        )
    losses: list[float] = []
    for step in range(1, way.steps + 1):
        value, gradient, scale = _taken(model, loss, place.parameters, scaler)
        norm = _norm(gradient)
        if norm == 0:
            warnings.warn(
                "The gradient of the relearning loss should not be 0. Found that it is, after "
                f"{step - 1} of {way.steps} steps, at a loss of {value:.3g}. No further step was "
                "taken; pass a loss that can fall.",
                stacklevel=4,
            )
            break
        losses.append(value)
        length = way.radius * theta / way.steps
        if way.unit == "loss":
            if losses[0] <= 0:
                raise ValueError(
                    'The loss should be above 0 where `unit` is "loss". Found '
                    f'{losses[0]:.3g}. Pass a radius in units of "theta" or "length".'
                )
            wanted = losses[0] * (1 - way.radius * step / way.steps)
            length = min(max(value - wanted, 0.0) * scale / norm, theta / way.steps)
        place.move(gradient, norm, length)
        del gradient  # before the next is there
    return tuple(losses)


def _taken(
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    scaler: GradScaler | None,
) -> tuple[float, Vector, float]:
    """The loss, and its gradient times a scale, over all processes.

    The scale is lowered until the gradient has room; half precision could not have it divided.
    """
    scale = min(loss_scale(scaler, parameters[0].device), MOST)
    while True:
        with beside(model), torch.enable_grad():
            passes = plan(parameters, {LOSS: loss}, scale=scale, model=model)
            gradients = reduced(model, parameters, passes)
        gradient = gradients.vectors[LOSS][: len(parameters)]
        if math.isfinite(_norm(gradient)):
            return distributed.mean([gradients.losses[LOSS]])[0], gradient, scale
        if scale <= 1:
            raise ValueError(
                "The gradient of the relearning loss should be finite. Found one that is not, at a "
                f"loss of {gradients.losses[LOSS]:.3g}. Choose a smaller `radius`, or bound the "
                "loss."
            )
        scale = max(scale / 16, 1.0)


def _norm(vector: Vector) -> float:
    """The Euclidean norm over all tensors, whole where they are sharded."""
    return math.sqrt(dots.grams([tensor] for tensor in vector).sum().item())
