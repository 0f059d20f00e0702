"""KL: the regulariser that holds the predictions on retain answers to those of before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geffect.batch import IGNORED, Batch, Pair, side_of
from geffect.risk import inputs_of, label_logits, token_mean
from geffect.risk.likelihood import at_least_float32
from geffect.sources import RETAIN

from .base import Component, Objective, Reduction, switch
from .reference import Reference, logits_before

PART = "kl"
"""The name of its component."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""How far apart two predictions are, from the logits of before and of now."""


@dataclass(frozen=True)
class KL(Objective):
    """KL: the mean of KL(p_o || p_theta) = sum_v p_o (log p_o - log p_theta) on the retain batch.

    Over the answer tokens, in nats per token and in float32 or finer; p_o are the predictions of
    the reference, the model before unlearning, and v goes over the vocabulary. With the
    cross-entropy -sum_v p_o log p_theta in its place, as some code has it, the gradient is the
    same. With -sum_v p_theta log p_o, as other code has it, it is not: its gradient is no zero at
    the reference.

    Released code takes the mean over all positions, those of the prompt and of the padding too, so
    that its weight depends on how long the padding is: `legacy_kl` reproduces that, where batches
    cannot be put together.

    >>> KL().reference, KL().sides
    ('logits', ('retain',))
    """

    source = "arXiv 2401.06121; open-unlearning for legacy_kl"
    reference = "logits"
    sides = (RETAIN,)

    legacy_kl: bool = False

    def __post_init__(self) -> None:
        switch("KL", "legacy_kl", self.legacy_kl)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)
        of_batch = self._over_all if self.legacy_kl else self._over_answers
        return {PART: Component(lambda: of_batch(model, side_of(batch, RETAIN), known))}

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({PART})

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {} if self.legacy_kl else {PART: Reduction(RETAIN, "token_mean")}

    def _over_answers(self, model: Any, batch: Batch, known: Reference) -> Tensor:
        return token_mean(*of_answers(model, batch, known))

    def _over_all(self, model: Any, batch: Batch, known: Reference) -> Tensor:
        logits: Tensor = model(**inputs_of(model, batch)).logits
        return divergence(known.logits(batch), logits).mean()


def of_answers(
    model: Any, batch: Batch, known: Reference, measured: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """KL(p_o || p_theta) of each scored token, `Float[sample, position]`, and the mask of these.

    0 where nothing is scored; `measured` is another divergence of both logits.
    """
    logits, labels = label_logits(model, batch)
    scored = labels != IGNORED
    before = logits_before(known, model, batch, logits)
    values = logits.new_zeros(labels.shape, dtype=at_least_float32(logits))
    wide = (x[scored].to(at_least_float32(x)) for x in (before, logits))
    values[scored] = (measured or divergence)(*wide).to(values)
    return values, scored


def divergence(before: Tensor, logits: Tensor) -> Tensor:
    """KL(p_o || p_theta) at each position, from the logits of both, `Float[position]`.

    A token that the reference rules out adds nothing.

    >>> certain = torch.tensor([[0.0, -torch.inf]])
    >>> divergence(certain, torch.zeros(1, 2))  # log 2
    tensor([0.6931])
    """
    log_o = torch.log_softmax(before.to(at_least_float32(before)), dim=-1)
    log_p = torch.log_softmax(logits.to(at_least_float32(logits)), dim=-1)
    terms = log_o.exp() * (log_o - log_p)
    return terms.where(log_o > -torch.inf, torch.zeros_like(terms)).sum(dim=-1)
