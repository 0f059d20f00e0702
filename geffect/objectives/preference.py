"""Objectives that prefer the forgotten: NPO, the preference loss with only a rejected answer.

NPO weighs whole answers, TNPO and WTNPO single tokens, by how much of the likelihood that they had
under the reference model is left. Formulas and weights: arXiv 2502.19301.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import Pair, check_one_answer
from geffect.risk import sequence_nll, sequence_sum, token_log_probabilities, token_mean
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive
from .reference import Reference


@dataclass(frozen=True)
class NPO(Objective):
    """NPO, negative preference optimisation: -(2/beta) mean_s log sigmoid(beta (l_s - l_{o,s})).

    l_s is the summed NLL of the answer of sample s (a sum, not a mean, over its tokens) and l_{o,s}
    the same under the reference, the model before unlearning. In nats per sequence. Its gradient is
    that of GA on sequence sums, each sample weighted by `weights`, which falls from 1 to 0 as the
    sample is forgotten. Default beta: arXiv 2503.09117.

    >>> NPO(beta=0.5)
    NPO(beta=0.5)
    """

    source = "arXiv 2404.05868"
    unbounded = True
    reference = "likelihoods"

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive("NPO", "beta", self.beta)

    def weights(self, loss: Tensor, reference_loss: Tensor) -> Tensor:
        """w_s = 2 p_s^beta / (p_s^beta + p_{o,s}^beta), from the summed NLLs, detached."""
        return 2 * torch.sigmoid(-self.beta * (loss - reference_loss).detach())

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        check_one_answer(batch[FORGET], "NPO")
        self.compared(reference, model)

        def loss() -> Tensor:
            summed = sequence_nll(model, batch[FORGET])
            left = self.beta * (summed - self._before(batch, reference))
            return -2 / self.beta * F.logsigmoid(left).mean()

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "sequence_sum")}

    def _before(self, batch: Pair, reference: Reference | None) -> Tensor:
        return -self.compared(reference).log_probabilities(batch[FORGET]).sum(dim=1)

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        check_one_answer(batch[FORGET], "NPO")
        return self.weights(-sequence_sum(log_p, scored), self._before(batch, reference))


@dataclass(frozen=True)
class TNPO(Objective):
    """Token-wise NPO: (1/N) sum_i w_i log p_i, w_i = 2 p_i^beta / (p_i^beta + p_{o,i}^beta).

    Token mean. p_o is under the reference, the model before unlearning; the weights are held
    constant in the gradient, which is that of (2/beta)(1/N) sum_i log(1 + (p_i / p_{o,i})^beta). A
    token counts less the more it is forgotten, whatever the rest of its answer does. `legacy_eps`
    is added to the denominator, where the released code has 1e-5: it stops tokens that are unlikely
    under both models.

    >>> TNPO()
    TNPO(beta=4.0, legacy_eps=0.0)
    """

    source = "arXiv 2502.19301"
    reference = "likelihoods"

    beta: float = 4.0
    legacy_eps: float = 0.0

    def __post_init__(self) -> None:
        positive(type(self).__name__, "beta", self.beta)
        if self.legacy_eps != 0.0:
            positive(type(self).__name__, "legacy_eps", self.legacy_eps)

    def weights(self, log_p: Tensor, reference_log_p: Tensor) -> Tensor:
        """w_i from the log-likelihoods of the tokens under both models, detached."""
        # In the logarithm, where no power of a small p underflows.
        eps = log_p.new_tensor(self.legacy_eps).log()
        denominator = torch.logaddexp(self.beta * reference_log_p, eps)
        return 2 * torch.sigmoid((self.beta * log_p - denominator).detach())

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)

        def loss() -> Tensor:
            log_p, scored = token_log_probabilities(model, batch[FORGET])
            before = known.log_probabilities(batch[FORGET])
            return token_mean(self.weights(log_p, before) * log_p, scored)

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        before = self.compared(reference).log_probabilities(batch[FORGET])
        return self.weights(log_p, before)[scored]


@dataclass(frozen=True)
class WTNPO(TNPO):
    """Weighted TNPO: (1/N) sum_i w_i log p_i, w_i = 2 p_i^(beta+alpha) / (p_i^beta + p_{o,i}^beta).

    Token mean. As TNPO, with the confidence weight p_i^alpha of WGA on top.

    >>> WTNPO(alpha=1.0)
    WTNPO(beta=4.0, legacy_eps=0.0, alpha=1.0)
    """

    alpha: float = field(default=1.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("WTNPO", "alpha", self.alpha)

    def weights(self, log_p: Tensor, reference_log_p: Tensor) -> Tensor:
        """w_i from the log-likelihoods of the tokens under both models, detached."""
        return super().weights(log_p, reference_log_p) * (self.alpha * log_p.detach()).exp()
