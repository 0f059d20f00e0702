"""DPO: an alternate answer is preferred to the one that is to be forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import Batch, Pair, check_one_answer, labels_of, original_of, side_of
from geffect.risk import check_answers, sequence_sum, token_log_probabilities
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive
from .reference import Reference
from .sides import ALTERNATE


@dataclass(frozen=True)
class DPO(Objective):
    """DPO: -(2/beta) mean_s log sigmoid(beta ((l_s - l_{o,s}) - (a_s - a_{o,s}))).

    l_s is the summed NLL of the original answer of sample s, which is rejected, a_s that of its
    alternate, which is preferred, and o marks both under the reference, the model before
    unlearning. In nats per sequence. With "I don't know" as the alternate it is IDK-DPO, and AltPO
    with answers of the model itself, as `geffect.data.alternates` samples them. The gradient is
    that of the mean over samples of `weights` times the log-likelihood of the original less that of
    the alternate. Where the alternates are empty it is `NPO`.

    Its likelihoods are all that it asks of the reference. The factor 2/beta is that of NPO, and of
    the public code (open-unlearning), whose numbers these are; the DPO paper has 1 in its place.

    >>> DPO(beta=0.5).sides
    ('forget', 'forget.alternate')
    """

    source = "arXiv 2305.18290, 2404.05868; AltPO: arXiv 2409.13474"
    reference = "likelihoods"
    sides = (FORGET, ALTERNATE)

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive("DPO", "beta", self.beta)

    def weights(self, margin: Tensor) -> Tensor:
        """w_s = 2 sigmoid(-beta margin_s) of what the original lost beside the alternate."""
        return 2 * torch.sigmoid(-self.beta * margin.detach())

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        self.compared(reference, model)
        _check_sides(model, batch)

        def loss() -> Tensor:
            return (
                -2
                / self.beta
                * F.logsigmoid(self.beta * self._margin(model, batch, reference)).mean()
            )

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "sequence_sum")}

    def implicit_weights(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Tensor]:
        """Of every sample the "weight" of both of its answers, and 1/p of the original's tokens."""
        _check_sides(model, batch)
        with torch.no_grad():
            weights = self.weights(self._margin(model, batch, reference))
        return {"weight": weights, **super().implicit_weights(model, batch, reference)}

    def _margin(self, model: Any, batch: Pair, reference: Reference | None) -> Tensor:
        """(l_s - l_{o,s}) - (a_s - a_{o,s}), `Float[sample]`."""
        known = self.compared(reference, model)
        original, alternate = (
            _lost(model, side_of(batch, side), known) for side in (FORGET, ALTERNATE)
        )
        return original - alternate


def _lost(model: Any, batch: Batch, known: Reference) -> Tensor:
    """The summed NLL of each answer less that under the reference, `Float[sample]`."""
    now = sequence_sum(*token_log_probabilities(model, batch))
    return known.log_probabilities(batch).sum(dim=1) - now


def _check_sides(model: Any, batch: Pair) -> None:
    counts = []
    for side in (FORGET, ALTERNATE):
        check_one_answer(side_of(batch, side), "DPO")
        counts.append(len(labels_of(side_of(batch, side))))
    if counts[0] != counts[1]:
        raise ValueError(
            f"`{ALTERNATE}` should have a row for each of `{FORGET}`, the alternate to its answer. "
            f"Found {counts[1]} rows beside {counts[0]}. Collate both answers of each item."
        )
    # An alternate may be empty: then DPO is NPO.
    check_answers(model, {FORGET: original_of(side_of(batch, FORGET))})
