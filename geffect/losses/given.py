"""The losses that are given for a step: tensors, functions and declared combinations of them."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from geffect.numbers import is_number
from geffect.sources import OBJECTIVE

from .graph import Graph

Scalar = Tensor | Callable[[], Tensor]
"""A scalar with a graph, or a function without arguments that returns one when it is asked."""

Loss = Scalar | Mapping[str, float]
"""A scalar, or weights that declare a linear combination of scalars."""


def tensors_among(given: Mapping[str, Scalar]) -> dict[str, Tensor]:
    """The scalars that are there already."""
    return {name: loss for name, loss in given.items() if isinstance(loss, Tensor)}


def declared(losses: Mapping[str, Loss]) -> dict[str, Mapping[str, float] | str]:
    """The weights of the losses that are combinations; "loss" for those that are scalars."""
    return {
        name: {part: float(weight) for part, weight in loss.items()}
        if isinstance(loss, Mapping)
        else "loss"
        for name, loss in losses.items()
    }


def of_objective(losses: Mapping[str, Loss]) -> dict[str, Loss]:
    """The losses that the objective needs: itself, and its parts where it is a combination."""
    objective = losses[OBJECTIVE]
    parts = objective if isinstance(objective, Mapping) else ()
    return {name: loss for name, loss in losses.items() if name == OBJECTIVE or name in parts}


def resolved(
    losses: Mapping[str, Loss],
) -> tuple[dict[str, Scalar], dict[str, dict[str, float]]]:
    """The different scalars among the losses, and each loss in terms of them."""
    given: dict[str, Scalar] = {}
    weights: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        if isinstance(loss, Mapping):
            continue
        if callable(loss):
            check_function(f"Loss `{name}`", loss)
        else:
            check_loss(name, loss)
        first = next((other for other, seen in given.items() if seen is loss), name)
        given.setdefault(first, loss)
        weights[name] = {first: 1.0}
    single = dict(weights)
    for name, loss in losses.items():
        if not isinstance(loss, Mapping):
            continue
        if not (loss.keys() <= single.keys() and _are_weights(loss.values())):
            raise ValueError(
                f"Loss `{name}` should be a scalar, or weights of scalars of this step, finite and "
                f"not all zero; a scalar is a tensor or a function that returns one. Found "
                f"`{dict(loss)}`. Pass weights of: {', '.join(single) or 'none'}."
            )
        weights[name] = {}
        for part, weight in loss.items():
            (scalar,) = single[part]
            weights[name][scalar] = weights[name].get(scalar, 0.0) + float(weight)
        if not any(weights[name].values()):
            raise ValueError(
                f"Loss `{name}` should be left with some weight. Found weights that cancel out, "
                f"`{dict(loss)}`, of one loss under several names. Pass different losses."
            )
    # The order of the sources is the order of the call, not of what kind they are.
    return given, {name: weights[name] for name in losses}


def check_loss(name: str, loss: object, *, asked: bool = False) -> Tensor:
    """The loss; what is none is refused, as it was passed or as its function returned it."""
    should, found, given = (
        (f"Loss `{name}` should be a function that returns a scalar tensor with a graph.",
         "Found one that returned", "Return the loss")
        if asked else
        (f"Loss `{name}` should be a scalar tensor with a graph, or weights of other losses.",
         "Found", "Pass what the loss returned, or a function that returns it")
    )  # fmt: skip
    if not isinstance(loss, Tensor):
        raise TypeError(f"{should} {found} `{type(loss).__name__}`. {given}.")
    if loss.numel() != 1:
        raise ValueError(f"{should} {found} shape {tuple(loss.shape)}. Take its mean or its sum.")
    if not loss.requires_grad:
        raise ValueError(
            f"{should} {found} a tensor without a graph. Compute it outside of `torch.no_grad()`, "
            "from parameters that require a gradient, and do not detach it."
        )
    return loss


def check_derivatives(name: str, graph: Graph) -> None:
    """Refuse a loss behind a part of which gradients end."""
    if graph.loses_gradient:
        raise ValueError(
            f"Loss `{name}` should be of operations that have derivatives. Found one that has none "
            "in its graph: gradients end there. Register its derivative "
            "(`torch.library.register_autograd`). Matrices of bitsandbytes in 4 bits lose theirs "
            "where an evaluation packs them for inference, as CPUs with AVX-512 do: set "
            "`support_avx512bf16_for_cpu = False` on each `Linear4bit` after loading."
        )


def check_function(what: str, function: Callable[..., object]) -> None:
    """Refuse a function that cannot be asked for a loss, or for what belongs to one."""
    should = f"{what} should be given by a function without arguments."
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{should} Found a coroutine. Pass a function that is not async.")
    try:
        # A module takes what its forward does.
        signature = inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):
        return  # what is not written in Python has none
    try:
        signature.bind()
    except TypeError:
        raise TypeError(
            f"{should} Found one that takes `{signature}`. Pass lambda: ... with the arguments "
            "inside."
        ) from None


class NotFinite(ValueError):
    """A loss whose value is infinite or no number."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value
        super().__init__(
            f"Loss `{name}` should be finite. Found {value}. "
            "Lower the learning rate or clip; no gradient was left and nothing was recorded."
        )

    def __reduce__(self) -> tuple[type["NotFinite"], tuple[str, float]]:
        return NotFinite, (self.name, self.value)  # the other processes raise it too


class Values:
    """The values of losses, which have to be finite.

    Those on a CPU are looked at when they come. Where others are there, the device is waited for
    once, when `read` is called, for all of them and for what else is to be read then. With `later`
    all are looked at then.
    """

    def __init__(self, *, later: bool = False) -> None:
        self._later = later
        self._known: dict[str, float] = {}
        self._coming: dict[str, Tensor] = {}

    def add(self, name: str, loss: Tensor) -> None:
        """Take in a loss."""
        if loss.device.type == "cpu" and not self._later:
            self._known[name] = _checked(name, loss.item())
        else:
            self._coming[name] = loss.detach()

    def read(self, *further: Tensor) -> list[float]:
        """Wait for the losses that are coming; the values of further tensors of one number each.

        Raises NotFinite.
        """
        coming, self._coming = self._coming, {}
        there = [tensor.detach().double().reshape(()) for tensor in (*coming.values(), *further)]
        if not there:
            return []
        # Between devices nothing is waited for.
        numbers = torch.stack([number.to(there[0].device) for number in there]).tolist()
        for name, value in zip(coming, numbers, strict=False):
            self._known[name] = _checked(name, value)
        return numbers[len(coming) :]

    def __getitem__(self, name: str) -> float:
        if name in self._coming:
            self.read()
        return self._known[name]


def _checked(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise NotFinite(name, value)
    return value


def _are_weights(values: Collection[object]) -> bool:
    return all(map(is_number, values)) and any(values)


def seeds_of(weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The factor to start a pass with, where the objective is one multiple of one loss.

    The pass then computes the objective's own gradient, bit for bit, and the loss's is that over
    the factor.
    """
    terms = weights.get(OBJECTIVE, {})
    if len(terms) != 1:
        return {}
    ((name, weight),) = terms.items()
    return {} if weight == 1.0 else {name: weight}
