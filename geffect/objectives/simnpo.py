"""SimNPO: NPO without a reference model, on the mean NLL of an answer in place of its sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import Pair, check_one_answer
from geffect.numbers import is_number
from geffect.risk import sequence_sum, token_log_probabilities, token_mean
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive
from .reference import Reference


@dataclass(frozen=True)
class SimNPO(Objective):
    """SimNPO: -(2/beta) mean_s log sigmoid(beta (l_s / n_s - delta)).

    l_s is the summed NLL of the answer of sample s and n_s the number of its tokens, so that long
    answers weigh no more than short ones. A sample without answer tokens takes no part in the mean.
    The gradient is that of the mean log-likelihood of each answer, weighted by `weights`; as beta
    goes to 0 it is that of GA by samples. `delta` stands inside of the product with beta, as in
    open-unlearning; the gamma of the paper, which stands outside, is beta delta.

    >>> SimNPO(beta=1.0)
    SimNPO(beta=1.0, delta=0.0)
    """

    source = "arXiv 2410.07163; defaults of open-unlearning"

    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        positive("SimNPO", "beta", self.beta)
        if not is_number(self.delta):
            raise ValueError(
                "`delta` of SimNPO should be a finite number. Found "
                f"`delta = {self.delta!r}`. Pass a number such as SimNPO(delta=0.0)."
            )

    def weights(self, loss: Tensor) -> Tensor:
        """w_s = 2 sigmoid(-beta (l_s / n_s - delta)), from the mean NLLs, detached."""
        return 2 * torch.sigmoid(-self.beta * (loss.detach() - self.delta))

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        check_one_answer(batch[FORGET], "SimNPO")

        def loss() -> Tensor:
            log_p, scored = token_log_probabilities(model, batch[FORGET])
            preference = F.logsigmoid(self.beta * (_mean_nll(log_p, scored) - self.delta))
            return -2 / self.beta * token_mean(preference, scored.any(dim=1))

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "sample_mean")}

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        check_one_answer(batch[FORGET], "SimNPO")
        return self.weights(_mean_nll(log_p, scored))[scored.any(dim=1)]


def _mean_nll(log_p: Tensor, scored: Tensor) -> Tensor:
    """The mean NLL of the answer of each sample, `Float[sample]`; 0 where it has none."""
    return -sequence_sum(log_p, scored) / scored.sum(dim=1).clamp(min=1)
