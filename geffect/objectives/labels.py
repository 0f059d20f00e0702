"""Objectives that teach other labels in place of the true ones: random ones, adversarial ones.

Formulas: "Machine Unlearning of Pre-trained Large Language Models" (arXiv 2402.15159). Its losses
are means over the tokens of a chunk, one chunk a batch; over several answers these are token means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geffect.batch import IGNORED, Pair
from geffect.risk import label_logits, log_likelihood, token_mean
from geffect.sources import FORGET

from .base import Component, Objective, Reduction
from .draws import check_seed, drawn
from .reference import Reference, logits_before


@dataclass(frozen=True)
class RandomLabels(Objective):
    """Random labels: -(1/N) sum_i log p(z_i | x_<i), z_i drawn uniformly from the vocabulary.

    Token mean over the answer tokens of the forget batch, in nats per token. The draw follows from
    `seed` and the row alone, its tokens up to the last that is scored: so it is the same in every
    epoch and after a resume, whatever stands beside the row and however it is padded or packed. The
    vocabulary is as wide as the logits; one draw in so many is the true label.

    >>> RandomLabels(seed=1)
    RandomLabels(seed=1)
    """

    source = "arXiv 2402.15159"

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("RandomLabels", self.seed)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        def loss() -> Tensor:
            logits, labels = label_logits(model, batch[FORGET])
            instead = drawn(model, batch[FORGET], logits.shape[-1], self.seed)
            return _taught(logits, labels, instead)

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}


@dataclass(frozen=True)
class AdversarialLabels(Objective):
    """Adversarial labels: -(1/N) sum_i log p(a_i | x_<i), a_i = argmax_{a != x_i} p_o(a | x_<i).

    Token mean over the answer tokens of the forget batch, in nats per token. p_o are the
    predictions of the reference, the model before unlearning: what it finds most likely after the
    true label, which does not change while the model is trained. The public code takes it from one
    position later, p_o(a | x_<=i), that is from the prediction of the next token.

    >>> AdversarialLabels().reference
    'logits'
    """

    source = "arXiv 2402.15159"
    reference = "logits"

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)

        def loss() -> Tensor:
            logits, labels = label_logits(model, batch[FORGET])
            before = logits_before(known, model, batch[FORGET], logits)
            return _taught(logits, labels, _most_likely(before, labels))

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}


def _most_likely(before: Tensor, labels: Tensor) -> Tensor:
    """What the reference finds most likely but for the labels, `Int[sample, position]`."""
    scored = labels != IGNORED
    others = before[scored].scatter(-1, labels[scored][:, None], -torch.inf)
    return labels.masked_scatter(scored, others.argmax(dim=-1))


def _taught(logits: Tensor, labels: Tensor, instead: Tensor) -> Tensor:
    """The NLL of other labels in the places of those that are scored."""
    scored = labels != IGNORED
    return -token_mean(log_likelihood(logits, instead.where(scored, labels)), scored)
