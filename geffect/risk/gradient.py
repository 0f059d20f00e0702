"""The risk of a set, and its gradient, taken without a trace in the model.

The gradient comes from real backward passes on the swapped `.grad`, since `torch.autograd.grad`
would bypass what sharded training lives on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.batch import on_device
from geffect.codes import check_unpacked
from geffect.dots import dense
from geffect.gradients import Vector
from geffect.layers import trainable

from .data import RiskSet, as_batches, share
from .likelihood import at_least_float32, token_log_probabilities
from .undisturbed import undisturbed

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes what is entered around each forward pass."""


@dataclass(frozen=True)
class RiskGradient:
    """The gradient of a risk by parameter, in the order of `geffect.layers.trainable`.

    `loss` is the risk itself in nats per token, `tokens` how many answer tokens it is a mean of.
    """

    vector: Vector
    loss: float
    tokens: int


def risk_gradient(
    model: nn.Module, batches: RiskSet, *, autocast: Autocast = nullcontext
) -> RiskGradient:
    """The gradient of R = -(1/N) sum_i log p_i over all N answer tokens of all batches.

    A long batch weighs more than a short one: sums of gradients are divided by all tokens, once.
    Without dropout; the model is left as it was found, see `undisturbed`. A parameter that the risk
    does not reach has None.

    - `batches`: of several processes each takes a share, and all get the gradient of the whole set;
      the batches have to come in the same order on all of them.
    - `autocast`: is entered around each forward pass. Likelihoods, and sums over batches, are in
      float32 or finer.

    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return type("Output", (), {"logits": super().forward(input_ids)})
    >>> model, ids = Table(2, 2), torch.tensor([[0, 1]])
    >>> _ = nn.init.zeros_(model.weight)  # p = 1/2 for either token
    >>> risk = risk_gradient(model, {"input_ids": ids, "labels": ids})
    >>> round(risk.loss, 4), risk.tokens, risk.vector[0].tolist(), model.weight.grad
    (0.6931, 1, [[0.5, -0.5], [0.0, 0.0]], None)
    """
    check_unpacked(model)
    parameters = list(trainable(model).values())
    sums: list[Tensor | None] = [None] * len(parameters)
    loss, tokens = 0.0, 0
    with (
        undisturbed(model),
        distributed.gradient_sync(model),
        distributed.beside_steps(parameters),
    ):
        for risk, count in _risks(model, batches, autocast):
            for parameter in parameters:
                parameter.grad = None
            distributed.backward(parameters, risk)
            sums = [_plus(a, p.grad) for a, p in zip(sums, parameters, strict=True)]
            loss, tokens = loss + risk.item(), tokens + count
    mean_loss, mean_tokens = _means(loss, tokens)
    vector = [
        None if total is None else total.div_(mean_tokens) for total in _averaged(parameters, sums)
    ]
    return RiskGradient(
        vector, mean_loss / mean_tokens, round(mean_tokens * distributed.world_size())
    )


def mean_nll(model: nn.Module, batches: RiskSet, *, autocast: Autocast = nullcontext) -> float:
    """R = -(1/N) sum_i log p_i over all N answer tokens of all batches, in nats per token.

    Without gradients, else as `risk_gradient`, whose `loss` it is.

    >>> from types import SimpleNamespace
    >>> class Uniform(nn.Module):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> mean_nll(Uniform(), [{"input_ids": ids, "labels": ids}])  # log 4
    1.38629...
    """
    loss, tokens = 0.0, 0
    with undisturbed(model), torch.no_grad():
        for risk, count in _risks(model, batches, autocast):
            loss, tokens = loss + risk.item(), tokens + count
        distributed.reshard(model)
    mean_loss, mean_tokens = _means(loss, tokens)
    return mean_loss / mean_tokens


def _risks(model: nn.Module, batches: RiskSet, autocast: Autocast) -> Iterator[tuple[Tensor, int]]:
    """The summed risk of each batch of this process's share, and how many tokens are in it."""
    device = next(model.parameters(), torch.empty(0)).device
    for batch in share(as_batches(batches)):
        with autocast():
            log_p, scored = token_log_probabilities(model, on_device(batch, device))
        yield -log_p.sum(), int(scored.sum())


def _means(loss: float, tokens: int) -> tuple[float, float]:
    """The means over the processes of sums over theirs: what is divided by what, for all."""
    mean_loss, mean_tokens = distributed.mean([loss, float(tokens)])
    if not mean_tokens:
        raise ValueError(
            "A risk should have an answer token: a label that is not -100, beyond the first "
            "position. Found none in any batch. Mark the answers in the labels."
        )
    return mean_loss, mean_tokens


def _averaged(parameters: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Vector:
    if distributed.world_size() == 1:
        return sums
    # Another process may have what this one has not, and in the type of a sum.
    present = [
        torch.zeros_like(p, dtype=at_least_float32(p), requires_grad=False)
        if total is None
        else total.to(at_least_float32(p))
        for total, p in zip(sums, parameters, strict=True)
    ]
    return distributed.average(parameters, {"risk": present})["risk"]


def _plus(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return total if grad is None else dense(grad)
    # A sum of many small terms: in bfloat16 it would stop to grow.
    return total.to(at_least_float32(total)).add_(grad)
