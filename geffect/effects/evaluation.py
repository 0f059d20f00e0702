"""A look at a model that leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, so that nothing is dropped out, for as long as the context lasts.

    Afterwards the modes of its modules, its buffers and the random state are as they were.

    >>> model = nn.Sequential(nn.Dropout()).train()
    >>> with evaluating(model):
    ...     model(torch.ones(2))
    tensor([1., 1.])
    >>> model[0].training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {parameter.device for parameter in model.parameters()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)  # a scaled rotary embedding registers another one
                if not torch.equal(buffer, before):
                    with torch.no_grad():
                        buffer.copy_(before)
