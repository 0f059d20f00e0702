"""Forwards beside those of a training step, which does not notice them."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect.interrupts import to_the_end

_PLAIN = (bool, int, float, str, type(None), Tensor)
_CONTAINERS = (list, dict, set, deque, Counter, OrderedDict, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def beside(model: nn.Module) -> Iterator[None]:
    """A block of forwards beside those of a training step, which does not notice them.

    Inside, the modules work on copies of their buffers: running statistics, power iterations,
    caches. Afterwards the buffers and plain attributes of every module (numbers, names, tensors,
    and lists, dicts and sets of them) and the random numbers are those from before, so that graphs
    from before stay valid, and those from inside too. Hooks that a module was given inside are gone
    with the attribute that notes them. Modes and gradients are left to the training.

    >>> model = nn.BatchNorm1d(2)
    >>> with beside(model):
    ...     loss = model(torch.randn(4, 2)).sum()
    >>> loss.backward()
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    kept = [(module, dict(module._buffers), _plain(module)) for module in model.modules()]
    hooks = [(of, set(of)) for module in model.modules() for of in _hooks_of(module)]
    held = [(x, _mapped(x)) for x in _containers(model)]
    copies: dict[int, Tensor] = {}

    def put_back() -> None:
        for container, members in held:
            _fill(container, members)
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
        for container, members in held:
            _fill(container, {k: _copied(value, copies) for k, value in members.items()})
        with random_numbers_kept():
            yield
    finally:
        to_the_end(put_back)


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """What a module calls around its forward and its backward, by numbers."""
    return (x for name, x in vars(module).items() if "_hooks" in name and isinstance(x, dict))


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _containers(model: nn.Module) -> list[Any]:
    """What holds several values in a module, itself or inside of another that does; each once."""
    found: dict[int, Any] = {}
    waiting = [v for m in model.modules() for k, v in vars(m).items() if k not in _OF_TORCH]
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = value
            waiting += _mapped(value).values()
    return list(found.values())


def _mapped(container: Any) -> dict[Any, Any]:
    """What a container holds, by its keys or places."""
    return dict(container if isinstance(container, dict) else enumerate(container))


def _fill(container: Any, members: dict[Any, Any]) -> None:
    """Let a container, which stays the same one, hold these and nothing else."""
    container.clear()
    if isinstance(container, dict):
        container.update(members)
    elif isinstance(container, set):
        container.update(members.values())
    else:
        container.extend(members.values())


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor, one and the same wherever modules share it; what is trained is none."""
    if not isinstance(value, Tensor) or value.requires_grad or isinstance(value, nn.Parameter):
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
