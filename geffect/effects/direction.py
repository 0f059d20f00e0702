"""The direction along which effects are measured: the gradient of a risk, at fixed parameters."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from geffect.batch import Batch
from geffect.gradients import Vector
from geffect.risk import risk_gradient


def direction(model: nn.Module, batches: Iterable[Batch]) -> Vector:
    """grad R(D), one tensor a parameter in the order of `geffect.layers.trainable`.

    R is the negative log-likelihood of all scored tokens of the batches, token mean over all of
    them together, in nats per token. It is the vector of `geffect.risk.risk_gradient`: in eval
    mode, and the model and its `.grad` stay as they were. A parameter that the risk does not reach
    has None.

    >>> import torch
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
    return risk_gradient(model, list(batches)).vector


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
