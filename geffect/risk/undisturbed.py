"""A look at a model during somebody else's training, which leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from geffect import distributed
from geffect.beside import beside
from geffect.codes import keep_differentiable
from geffect.interrupts import to_the_end


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
            keep_differentiable(model)
            for parameter, _ in grads:
                parameter.grad = None
            # What an enclosing autocast has cast belongs to a graph of training, and what is cast
            # here must not become part of one.
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            to_the_end(put_back)


def _turn_dropout_off(model: nn.Module, *, recompute: bool) -> None:
    # Not `model.eval()`, which modules may override to do more.
    for module in model.modules():
        module.training = False
    # Layers checkpoint their activations in train mode alone. Where the architecture knows no
    # dropout that mode changes nothing else, and without checkpoints the memory might not suffice.
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if recompute and recomputing and not _has_dropout(model):
        for module in recomputing:
            module.training = True


def _let_be_differentiated(model: nn.Module) -> None:
    """Recurrent layers in train mode: cuDNN takes gradients of no others.

    That differs from eval mode by their dropout, which is turned off.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.training, module.dropout = True, 0.0


def _has_dropout(model: nn.Module) -> bool:
    config = getattr(distributed.module_in(model), "config", None)
    if config is None:
        return True
    options = config.get_text_config().to_dict()
    return any("drop" in name and isinstance(v, float) and v > 0 for name, v in options.items())
