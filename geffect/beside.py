"""Forwards beside those of a training step, which does not notice them."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect.codes import FLOATS, holds_codes
from geffect.interrupts import to_the_end

_PLAIN = (bool, int, float, str, type(None), Tensor)
_CONTAINERS = (list, dict, set, deque, Counter, OrderedDict, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module()))

_GENERATORS: dict[type, Callable[[Any], Callable[[], object]]] = {
    torch.Generator: lambda drawn: partial(drawn.set_state, drawn.get_state()),
    random.Random: lambda drawn: partial(drawn.setstate, drawn.getstate()),
    np.random.RandomState: lambda drawn: partial(drawn.set_state, drawn.get_state()),
    np.random.Generator: lambda drawn: partial(
        setattr, drawn.bit_generator, "state", copy.deepcopy(drawn.bit_generator.state)
    ),
}
"""How what draws random numbers is noted, and put back."""

_SIMPLE: tuple[type, ...] = (*_PLAIN, *_CONTAINERS, *_GENERATORS)
"""What an object may hold that is put back as a whole."""


@contextmanager
def beside(model: nn.Module) -> Iterator[None]:
    """A block of forwards beside those of a training step, which does not notice them.

    Inside, the modules work on copies of their buffers: running statistics, power iterations,
    caches. Afterwards the buffers and plain attributes of every module (numbers, names, tensors,
    lists, dicts and sets of them, and objects that have nothing else) and the random numbers, also
    of generators that a module holds, are those from before, so that graphs from before stay valid,
    and those from inside too. Hooks that a module was given inside are gone with the attribute that
    notes them. Modes and gradients are left to the training.

    >>> model = nn.BatchNorm1d(2)
    >>> with beside(model):
    ...     loss = model(torch.randn(4, 2)).sum()
    >>> loss.backward()
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    containers, objects, generators = _held(model)
    buffered = [(module, dict(module._buffers)) for module in model.modules()]
    kept = [(owner, _plain(owner)) for owner in (*model.modules(), *objects)]
    hooks = [(of, set(of)) for module in model.modules() for of in _hooks_of(module)]
    held = [(x, _mapped(x)) for x in containers]
    drawn = [_GENERATORS[type(x)](x) for x in generators]
    copies: dict[int, Tensor] = {}

    def put_back() -> None:
        for container, members in held:
            _fill(container, members)
        for module, buffers in buffered:
            module._buffers.clear()
            module._buffers.update(buffers)
        for owner, attributes in kept:
            for name in _plain(owner).keys() - attributes.keys():
                del vars(owner)[name]
            vars(owner).update(attributes)
        for of_before in drawn:
            of_before()
        for of, known in hooks:
            for added in of.keys() - known:
                del of[added]

    try:
        for module, buffers in buffered:
            module._buffers.update({k: _copied(value, copies) for k, value in buffers.items()})
        for owner, attributes in kept:
            vars(owner).update({k: _copied(value, copies) for k, value in attributes.items()})
        for container, members in held:
            _fill(container, {k: _copied(value, copies) for k, value in members.items()})
        with random_numbers_kept():
            yield
    finally:
        to_the_end(put_back)


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """What a module calls around its forward and its backward, by numbers."""
    return (x for name, x in vars(module).items() if "_hooks" in name and isinstance(x, dict))


def _plain(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if isinstance(value, _PLAIN)}


def _held(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """The containers, the objects and the generators in modules or inside of each other, once."""
    containers: dict[int, Any] = {}
    objects: dict[int, Any] = {}
    generators: dict[int, Any] = {}
    waiting = [v for m in model.modules() for v in _beside_torch(m)]
    while waiting:
        value = waiting.pop()
        if id(value) in containers or id(value) in objects:
            continue
        if type(value) in _CONTAINERS:
            containers[id(value)] = value
            waiting += _mapped(value).values()
        elif type(value) in _GENERATORS:
            generators[id(value)] = value
        elif _is_state(value):
            objects[id(value)] = value
            waiting += vars(value).values()
    return [*containers.values()], [*objects.values()], [*generators.values()]


def _beside_torch(module: nn.Module) -> Iterator[Any]:
    """What a module holds of its own.

    Weights that are codes have state objects beside them, which a first forward makes ready for
    good: these are left alone.
    """
    own = [p for p in module._parameters.values() if p is not None]
    has_codes = any(holds_codes(p) or p.dtype not in FLOATS for p in own)
    for name, value in vars(module).items():
        if name not in _OF_TORCH and not (has_codes and _is_state(value)):
            yield value


def _is_state(value: Any) -> bool:
    """Whether an object holds only what can be put back, as one that counts, or has a schedule."""
    if isinstance(value, (*_SIMPLE, nn.Module, type)):
        return False
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return bool(attributes) and all(isinstance(x, _SIMPLE) for x in attributes.values())


def _mapped(container: Any) -> dict[Any, Any]:
    """What a container holds, by its keys or places."""
    return dict(container if isinstance(container, dict) else enumerate(container))


def _fill(container: Any, members: dict[Any, Any]) -> None:
    """Let a container, which stays the same one, hold these and nothing else.

    It is not touched where it does, since a set that is filled anew may have another order.
    """
    of_now, of_then = ([*map(id, (*x, *x.values()))] for x in (_mapped(container), members))
    if of_now == of_then:
        return
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
