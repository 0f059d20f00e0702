"""UNDIAL: distillation from the model before unlearning, with the true token made less likely."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geffect.batch import IGNORED, Pair
from geffect.risk import at_least_float32, check_answers, label_logits
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive, switch
from .reference import Reference, logits_before


@dataclass(frozen=True)
class UNDIAL(Objective):
    """UNDIAL: (1/N) sum_i CE(q_i, p_i), where q_i = softmax(z_{o,i} - beta onehot(y_i)).

    Token mean over the answer tokens. z_{o,i} are the logits of the reference, the model before
    unlearning: the teacher is that model, with the logit of the true token y_i lowered by beta. The
    gradient on the logits is p_i - q_i, which ends where p is q; it is bounded. It weighs no single
    log-likelihood, so that of implicit weights there is the inverse confidence alone. Logits have
    to be asked of the reference: kept likelihoods do not do.

    `legacy` is the loss of the public code (open-unlearning): the mean over all positions, those of
    questions and padding too. There the label -100 counts from the end of the vocabulary, so the
    logit of its hundredth-last token is lowered where nothing is to be forgotten. It depends on the
    padding, has no declared reduction, and a vocabulary of fewer than 100 tokens has none.

    >>> UNDIAL(beta=3.0)
    UNDIAL(beta=3.0, legacy=False)
    """

    source = "arXiv 2402.10052; defaults of open-unlearning"
    reference = "logits"

    beta: float = 10.0
    legacy: bool = False

    def __post_init__(self) -> None:
        positive("UNDIAL", "beta", self.beta)
        switch("UNDIAL", "legacy", self.legacy)

    def teacher(self, reference_logits: Tensor, labels: Tensor) -> Tensor:
        """q_i = softmax(z_{o,i} - beta onehot(y_i)), `Float[..., token]`."""
        penalty = torch.full_like(labels[..., None], -self.beta, dtype=reference_logits.dtype)
        return reference_logits.scatter_add(-1, labels[..., None], penalty).softmax(-1)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)

        def loss() -> Tensor:
            logits, labels = label_logits(model, batch[FORGET])
            before = logits_before(known, model, batch[FORGET], logits)
            scored = labels != IGNORED
            if self.legacy:
                labels = _from_the_end(labels, logits.shape[-1])
                scored = torch.ones_like(scored)
            elif not scored.any():
                check_answers(model, {FORGET: batch[FORGET]})
            student, taught = (z[scored].to(at_least_float32(z)) for z in (logits, before))
            q, log_p = self.teacher(taught, labels[scored]), student.log_softmax(-1)
            # A token that both rule out adds nothing.
            return -(q * log_p.where(q > 0, torch.zeros_like(log_p))).sum(-1).mean()

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {} if self.legacy else {FORGET: Reduction(FORGET, "token_mean")}


def _from_the_end(labels: Tensor, vocabulary: int) -> Tensor:
    """The labels as an index takes them: -100 is the hundredth-last token."""
    if vocabulary < -IGNORED:
        raise ValueError(
            f"The vocabulary should have {-IGNORED} tokens or more for `legacy` of UNDIAL, which "
            f"takes {IGNORED} for one of them. Found {vocabulary}. Leave `legacy` out."
        )
    return labels.where(labels != IGNORED, torch.full_like(labels, vocabulary + IGNORED))
