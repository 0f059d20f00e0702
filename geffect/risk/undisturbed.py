"""A look at a model during somebody else's training, which leaves it as it was."""

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
def undisturbed(model: nn.Module, *, recompute: bool = True) -> Iterator[None]:
    """A block in which the model may be run and differentiated, and which leaves no trace in it.

    Inside, dropout is off, every `.grad` is None and gradients are enabled. Afterwards gradients,
    the mode and plain attributes of every module, buffers, and the random numbers of torch on every
    device, of numpy and of Python are what they were.

    - `recompute`: layers that checkpoint their activations go on doing so, in a model without
      dropout. False where hooks are to see each layer once.

    >>> model = nn.Dropout(0.5)
    >>> with undisturbed(model):
    ...     model(torch.ones(3))
    tensor([1., 1., 1.])
    >>> model.training
    True
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    cached = torch.is_autocast_cache_enabled()

    def put_back() -> None:
        torch.set_autocast_cache_enabled(cached)
        for parameter, grad in grads:
            parameter.grad = grad

    with beside(model), torch.enable_grad():
        try:
            _turn_dropout_off(model, recompute=recompute)
            _let_be_differentiated(model)
            for parameter, _ in grads:
                parameter.grad = None
            # What an enclosing autocast has cast belongs to a graph of training, and what is cast
            # here must not become part of one.
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            to_the_end(put_back)


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


def _turn_dropout_off(model: nn.Module, *, recompute: bool) -> None:
    # Not `model.eval()`, which modules may override to do more.
    for module in model.modules():
        module.training = False
    if not recompute or _has_dropout(model):
        return
    # Layers checkpoint their activations in train mode alone. Where the architecture knows no
    # dropout that mode changes nothing else, and without checkpoints the memory might not suffice.
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def _let_be_differentiated(model: nn.Module) -> None:
    """Recurrent layers in train mode: cuDNN takes gradients of no others.

    That differs from eval mode by their dropout, which is turned off.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.training, module.dropout = True, 0.0


def _has_dropout(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if config is None:
        return True
    options = config.get_text_config().to_dict()
    return any("drop" in name and isinstance(v, float) and v > 0 for name, v in options.items())
