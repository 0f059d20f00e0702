"""A block of forwards after which a model, and all that draws random numbers, is as before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from geffect.interrupts import to_the_end

from .remembered import copied, generators, holders, remembered


@contextmanager
def beside(model: nn.Module) -> Iterator[None]:
    """A block of forwards beside those of a training step, which does not notice them.

    Inside, the modules work on copies of their buffers: running statistics, power iterations,
    caches. Afterwards the buffers and attributes of every module, what lists, dicts, sets, arrays
    and objects in them hold, and the random numbers, also of generators that a module holds, are
    those from before, so that graphs from before stay valid, and those from inside too. Hooks that
    a module was given inside are gone with the attribute that notes them. Gradients are left to the
    training, and so are objects that hold a module, a lock or a file.

    >>> model = nn.BatchNorm1d(2)
    >>> with beside(model):
    ...     loss = model(torch.randn(4, 2)).sum()
    >>> loss.backward()
    >>> model.running_mean, model.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    found, modules = remembered(model), [*model.modules()]
    buffered = [(module, dict(module._buffers)) for module in modules]
    hooks = [(of, set(of)) for module in modules for of in _hooks_of(module)]
    held, drawn = [*holders(found)], [*generators(found)]
    copies: dict[int, Any] = {}

    def put_back() -> None:
        for hold, members in held:
            hold(members)
        for module, buffers in buffered:
            module._buffers.clear()
            module._buffers.update(buffers)
        for go_on in drawn:
            go_on()
        for of, known in hooks:
            for added in of.keys() - known if of else ():
                del of[added]

    try:
        for module, buffers in buffered:
            module._buffers.update({k: copied(value, copies) for k, value in buffers.items()})
        for hold, members in held:
            inside = {k: copied(value, copies) for k, value in members.items()}
            if any(inside[k] is not value for k, value in members.items()):
                hold(inside)
        with random_numbers_kept():
            yield
    finally:
        to_the_end(put_back)


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """What a module calls around its forward and its backward, by numbers."""
    return (x for name, x in vars(module).items() if "_hooks" in name and isinstance(x, dict))


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
