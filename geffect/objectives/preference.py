"""Objectives that prefer the forgotten: NPO, the preference loss with only a rejected answer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Objective, Pair, positive, sequence_sum, token_log_probabilities


@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimisation: -(2/beta) mean_s log sigmoid(beta (l_s - l_{o,s})).

    l_s is the summed NLL of the answer of sample s (a sum, not a mean, over its tokens) and l_{o,s}
    the same under `reference`, the model before unlearning. In nats per sequence. Its gradient is
    that of GA on sequence sums, each sample weighted by `weights`, which falls from 1 to 0 as the
    sample is forgotten. Formula and weight: arXiv 2502.19301; default beta: arXiv 2503.09117.

    >>> NPO(beta=0.5)
    NPO(beta=0.5)
    """

    beta: float = 0.1
    reference: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive("NPO", "beta", self.beta)

    def weights(self, loss: Tensor, reference_loss: Tensor) -> Tensor:
        """w_s = 2 p_s^beta / (p_s^beta + p_{o,s}^beta), from the summed NLLs, detached."""
        return 2 * torch.sigmoid(-self.beta * (loss - reference_loss).detach())

    def components(self, model: Any, batch: Pair) -> dict[str, tuple[Tensor, float]]:
        if self.reference is None:
            raise ValueError(
                "`reference` of NPO should be the model as it was before unlearning. Found None. "
                "Pass NPO(reference=copy.deepcopy(model).eval())."
            )
        loss = -sequence_sum(*token_log_probabilities(model, batch["forget"]))
        with torch.no_grad():
            reference = -sequence_sum(*token_log_probabilities(self.reference, batch["forget"]))
        preference = F.logsigmoid(self.beta * (loss - reference)).mean()
        return {"forget": (preference, -2 / self.beta)}
