"""An optimizer's step, taken a few tensors at a time: no copy of the model is made for it."""

import copy
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks

from geffect import distributed
from geffect.interrupts import put_back_after, to_the_end
from geffect.steps import moved_by

Kept = TypeVar("Kept")

PORTION_BYTES = 2**24
"""How much of the parameters is stepped at a time."""


def steps_tensor_by_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is one of each tensor by itself, as that of all optimizers of torch."""
    return type(optimizer).__module__.startswith("torch.optim.")


def step_in_portions(
    optimizer: torch.optim.Optimizer,
    before: Callable[[Tensor], Kept],
    after: Callable[[Tensor, Kept], None],
) -> Callable[[], None]:
    """Take the optimizer's step a few tensors at a time, and call `before` and `after` around each.

    To be called before the step itself, which then finds no gradient and moves nothing: hooks and
    schedulers see that one step. Returns what puts the gradients back. Bit for bit the step that it
    would have been.
    """
    grads = [(tensor, tensor.grad) for tensor in moved_by(optimizer)]
    twin = _twin(optimizer)

    def put_back() -> None:
        for tensor, grad in grads:
            tensor.grad = grad

    try:
        for tensor, _ in grads:
            tensor.grad = None
        for portion in _portions(grads):
            states = []
            for tensor, grad in portion:
                tensor.grad = grad
                states.append(before(tensor))
            _step_without_hooks_of_all(twin)
            with torch.no_grad():
                for (tensor, _), state in zip(portion, states, strict=True):
                    after(tensor, state)
                    tensor.grad = None
    except BaseException:
        to_the_end(put_back)
        raise
    return put_back


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer without what others have hung on its step: hooks, and wrappers of `step`.

    State, groups and all else are shared. A copy of an optimizer has no hooks.
    """
    twin = copy.copy(optimizer)
    own = vars(twin).keys() | {"step"}
    vars(twin).update((name, value) for name, value in vars(optimizer).items() if name not in own)
    return twin


def _step_without_hooks_of_all(optimizer: torch.optim.Optimizer) -> None:
    """A step without the hooks for the steps of all optimizers: torch has no switch for them."""
    kept: list[tuple[MutableMapping[int, Any], dict[int, Any]]] = [
        (hooks, dict(hooks)) for hooks in (pre_hooks, post_hooks)
    ]

    def step() -> None:
        for hooks, _ in kept:
            hooks.clear()
        optimizer.step()

    def put_back() -> None:
        for hooks, known in kept:
            hooks.update(known)

    put_back_after(step, put_back)


def _portions(
    grads: Sequence[tuple[Tensor, Tensor | None]],
) -> Iterable[list[tuple[Tensor, Tensor | None]]]:
    portion: list[tuple[Tensor, Tensor | None]] = []
    size = 0
    for tensor, grad in grads:
        own = distributed.local(tensor.detach()).nbytes
        if portion and size + own > PORTION_BYTES:
            yield portion
            portion, size = [], 0
        portion.append((tensor, grad))
        size += own
    if portion:
        yield portion
