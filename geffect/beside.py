"""Forwards beside those of a training step, which does not notice them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect.interrupts import to_the_end

_PLAIN = (bool, int, float, str, type(None), Tensor)


@contextmanager
def beside(model: nn.Module) -> Iterator[None]:
    """A block of forwards beside those of a training step, which does not notice them.

    Inside, the modules work on copies of their buffers: running statistics, power iterations,
    caches. Afterwards the buffers and plain attributes of every module (numbers, names, tensors)
    and the random numbers are those from before, so that graphs from before stay valid, and those
    from inside too. Hooks that a module was given inside are gone with the attribute that notes
    them. Modes and gradients are left to the training.

    >>> model = nn.BatchNorm1d(2)
    >>> with beside(model):
    ...     loss = model(torch.randn(4, 2)).sum()
    >>> loss.backward()
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    kept = [(module, dict(module._buffers), _plain(module)) for module in model.modules()]
    hooks = [(of, set(of)) for module in model.modules() for of in _hooks_of(module)]
    copies: dict[int, Tensor] = {}

    def put_back() -> None:
        for module, buffers, attributes in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name in _plain(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for of, known in hooks:
            for added in of.keys() - known:
                del of[added]

    try:
        for module, buffers, attributes in kept:
            module._buffers.update({k: _copied(value, copies) for k, value in buffers.items()})
            vars(module).update({k: _copied(value, copies) for k, value in attributes.items()})
        with random_numbers_kept():
            yield
    finally:
        to_the_end(put_back)


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """What a module calls around its forward and its backward, by numbers."""
    return (x for name, x in vars(module).items() if "_hooks" in name and isinstance(x, dict))


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor, one and the same wherever modules share it; what is trained is none."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    if id(value) not in copies:
        copies[id(value)] = value.detach().clone()
    return copies[id(value)]


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """A block after which random numbers go on as if nothing had drawn any inside."""
    of_python, of_numpy = random.getstate(), np.random.get_state()

    def put_back() -> None:
        random.setstate(of_python)
        np.random.set_state(of_numpy)

    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        to_the_end(put_back)
