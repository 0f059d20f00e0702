"""What a model is to the bit."""

import torch
from torch import nn


def bits(model: nn.Module) -> dict[str, bytes]:
    """All parameters and buffers, as they lie in memory."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in named}
