"""The PG-effect of every token, from one forward-mode pass over a batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from geffect.batch import Batch, check_one_answer
from geffect.codes import check_unpacked
from geffect.gradients import Vector
from geffect.layers import trainable
from geffect.risk import predicts_next, scored_tokens, token_log_probabilities, undisturbed

from .differential import Parameters, differential
from .direction import check_direction


@dataclass(frozen=True)
class TokenEffects:
    """`values` and `log_p`, both `Float64[sample, position]`; NaN where a token is not scored."""

    values: Tensor
    log_p: Tensor

    @property
    def by_sample(self) -> Tensor:
        """The effect of log p(s), the sum over the answer, `Float64[sample]`."""
        return self.values.nansum(dim=1)


def token_effects(model: nn.Module, batch: Batch, direction: Vector) -> TokenEffects:
    """PG_D(s^i) = <grad R(D), grad log p(s^i | s^{<i})>, for all scored tokens of all samples.

    `direction` is grad R(D), as `geffect.effects.direction` takes it at the same parameters. A step
    of gradient ascent on one token, theta <- theta - rate grad log p, changes R(D) by
    -rate PG_D(s^i): with D the forget set, negative is good; with D the retain set, negative is
    collateral damage. In nats per unit learning rate, not normalised, no learning rate inside. The
    effect of a sample is that of its summed log-likelihood, so tokens add up to it. Definition:
    arXiv 2502.19301, eq. 5.

    This is the effect of the loss of a token, spread over all positions that the token is predicted
    from. What the parameters do at one position is another quantity with the same sum.

    All derivatives come from one pass, d/de log p(s^i; theta + e grad R) at e = 0. Where an
    operation has no forward rule (the experts of a mixture, an LSTM, kernels of one's own), each
    token takes a backward pass. In eval mode;
    frozen parameters stand still, tied ones move in all their places, and the model stays as it
    was.

    >>> from types import SimpleNamespace
    >>> class Unigram(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Parameter(torch.zeros(2))
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 2))
    >>> batch = {"input_ids": torch.tensor([[0, 1, 1]]), "labels": torch.tensor([[-100, 0, 1]])}
    >>> token_effects(Unigram(), batch, [torch.tensor([1.0, 0.0])]).values
    tensor([[    nan,  0.5000, -0.5000]], dtype=torch.float64)
    """
    check_unpacked(model)
    tensors = list(trainable(model).values())
    check_direction(tensors, direction)
    check_one_answer(batch, "effects of tokens, which add up to those of samples")
    names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    with undisturbed(model, recompute=False):
        scored = scored_tokens(model, batch)

        def log_probabilities(parameters: Parameters) -> Tensor:
            return token_log_probabilities(_At(model, parameters), batch)[0][scored]

        found = differential(
            log_probabilities,
            at={names[p]: p for p in tensors},
            along={names[p]: v for p, v in zip(tensors, direction, strict=True) if v is not None},
        )
    log_p, slopes = (_placed(values, scored) for values in found)
    if predicts_next(model):  # the first position predicts, but is not predicted
        log_p, slopes = (F.pad(values, (1, 0), value=torch.nan) for values in (log_p, slopes))
    return TokenEffects(slopes, log_p)


def _placed(values: Tensor, scored: Tensor) -> Tensor:
    """The values of the scored tokens at their places, `Float64`; NaN at the others."""
    return torch.full(
        scored.shape, torch.nan, dtype=torch.float64, device=values.device
    ).masked_scatter(scored.to(values.device), values.double())


@dataclass(frozen=True)
class _At:
    """The model at other parameters."""

    module: nn.Module
    parameters: Parameters

    def __call__(self, **inputs: Tensor) -> Any:
        return functional_call(self.module, dict(self.parameters), (), inputs)
