"""Rules asked about vectors, by way of the Gram matrix that they are functions of."""

import torch
from torch import Tensor

from geffect.projection.rules import Rule, gru


def gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T


def step(rule: Rule, *vectors: Tensor) -> Tensor:
    """The new gradient, of u and the retain gradients."""
    matrix = torch.stack(vectors)
    return rule(gram(matrix)) @ matrix


def rectified(u: Tensor, r: Tensor) -> Tensor:
    """What GRU makes of u beside one retain gradient."""
    return step(gru, u, r)


def tensors(*values: list[float]) -> list[Tensor]:
    """The vectors in float64."""
    return [torch.tensor(value, dtype=torch.float64) for value in values]
