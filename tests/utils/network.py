"""Two layers, and a risk that such a network takes, for tests of steps."""

import torch
from torch import Tensor, nn


def network(seed: int = 0, width: int = 4) -> nn.Sequential:
    """Two layers and what they are trained with."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def risk(model: nn.Module, seed: int) -> Tensor:
    """The mean square of the outputs for five rows, which the seed draws."""
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    return (model(inputs) ** 2).mean()
