"""The implicit weights of an objective, which may be asked for as its losses are."""

from collections.abc import Callable, Mapping
from functools import wraps

import torch
from torch import Tensor, nn

from geffect.beside import beside
from geffect.losses import Loss, check_function, of_objective

ImplicitWeights = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
"""Weights by name, or a function that returns them."""


def asked_with(
    model: nn.Module,
    losses: Mapping[str, Loss],
    weights: ImplicitWeights | None,
    check: Callable[[Mapping[str, Tensor]], None],
) -> tuple[dict[str, Loss], dict[str, Tensor]]:
    """The losses, and the weights, whose function is called right after the objective's first loss.

    What it shares with that loss is there then. Where no loss of the objective is a function it is
    called at once. It leaves no trace in the model; `check` sees what it returns.
    """
    found: dict[str, Tensor] = {}

    def take(known: Mapping[str, Tensor]) -> None:
        _check_tensors(known)
        check(known)
        found.update(known)

    if not callable(weights):
        take({} if weights is None else weights)
        return {**losses}, found
    check_function("`weights`", weights)

    def note() -> None:
        with beside(model), torch.no_grad():
            returned = weights()
        take(returned)

    first = next((loss for loss in of_objective(losses).values() if callable(loss)), None)
    if first is None:
        note()
        return {**losses}, found

    @wraps(first)
    def asked() -> Tensor:
        loss = first()
        if not found:  # at a relearned copy, before the same loss is asked at theta
            note()
        return loss

    return {name: asked if loss is first else loss for name, loss in losses.items()}, found


def _check_tensors(weights: object) -> None:
    entries = weights.values() if isinstance(weights, Mapping) else [weights]
    wrong = [type(value).__name__ for value in entries if not isinstance(value, Tensor)]
    if wrong or not isinstance(weights, Mapping):
        found = wrong[0] if wrong else type(weights).__name__
        raise TypeError(
            "`weights` should be tensors by name, or a function that returns these. Found "
            f"`{found}`. Pass what `implicit_weights` of the objective returns."
        )
