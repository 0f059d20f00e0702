"""The direction along which effects are measured: the gradient of a risk, at fixed parameters."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from geffect.batch import Batch, scored_tokens
from geffect.gradients import Vector, differentiate
from geffect.layers import trainable
from geffect.risk import sequence_sum, token_log_probabilities

from .evaluation import evaluating


def direction(model: nn.Module, batches: Iterable[Batch]) -> Vector:
    """grad R(D), one tensor a parameter in the order of `geffect.layers.trainable`.

    R is the negative log-likelihood of all scored tokens of the batches, token mean over all of
    them together, in nats per token. In eval mode; the model and its `.grad` stay as they were. A
    parameter that the risk does not reach has None. Sums are kept in float32, or the parameters'
    own type if that is finer.

    >>> from types import SimpleNamespace
    >>> class Unigram(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Parameter(torch.zeros(2))
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 2))
    >>> ids = torch.tensor([[0, 1, 1]])
    >>> direction(Unigram(), [{"input_ids": ids, "labels": ids}])  # p - (share of each token)
    [tensor([ 0.5000, -0.5000])]
    """
    parameters = list(trainable(model).values())
    batches = list(batches)
    count = sum(int(scored_tokens(batch).sum()) for batch in batches)
    if count == 0:
        raise ValueError(
            "`batches` should have tokens that are scored. Found none in "
            f"{len(batches)} batches. Pass batches whose labels are not all -100."
        )
    total: list[Tensor | None] = [None] * len(parameters)
    with evaluating(model):
        for batch in batches:
            risk = -sequence_sum(*token_log_probabilities(model, batch)).sum() / count
            gradient = differentiate(parameters, {"risk": risk}).of("risk")
            total = [_added(a, b) for a, b in zip(total, gradient, strict=True)]
    return total


def check_direction(parameters: Sequence[Tensor], along: Vector) -> None:
    """Raises unless there is a tensor of the right shape, or None, for every parameter."""
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in along]
    expected = [tuple(parameter.shape) for parameter in parameters]
    fits = len(shapes) == len(expected) and all(
        shape in (None, wanted) for shape, wanted in zip(shapes, expected, strict=True)
    )
    if not fits:
        raise ValueError(
            "`direction` should have one tensor for each trainable parameter, of its shape, or "
            f"None. Found {len(shapes)} tensors for {len(expected)} parameters: {shapes} for "
            f"{expected}. Take it from geffect.effects.direction with this model."
        )


def _added(total: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return total
    if total is None:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return total.add_(tensor)
