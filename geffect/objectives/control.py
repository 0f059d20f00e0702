"""Controls of gradient ascent: how likely an answer is, how flat the softmax, which tokens count.

"Unlearning with Control" (arXiv 2406.09179), and its bound by tokens. Each goes with a regulariser
behind it, as in `likelihood-control+kl`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import IGNORED, Pair, check_one_answer
from geffect.risk import (
    at_least_float32,
    label_logits,
    log_likelihood,
    sequence_nll,
    sequence_sum,
    token_log_probabilities,
    token_mean,
)
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive, share_of, switch
from .likelihood import WeightedLikelihood
from .reference import Reference


@dataclass(frozen=True)
class LikelihoodControl(Objective):
    """Likelihood control: mean_s max(0, delta - l_s), ascent that ends where an answer is unlikely.

    l_s is the summed NLL of the answer of sample s, and `delta` a bound for it, in nats per
    sequence. An answer of which p_s < exp(-delta) has no gradient any more; the others have that of
    GA on sequence sums.

    The public code divides by the number of answers that are likely still, so that one weighs more
    the more of the others are done: `legacy` reproduces that. Its delta is 2, or 6 in its README.

    >>> LikelihoodControl(delta=6.0)
    LikelihoodControl(delta=6.0, legacy=False)
    """

    source = "arXiv 2406.09179, public code"

    delta: float = 2.0
    legacy: bool = False

    def __post_init__(self) -> None:
        positive("LikelihoodControl", "delta", self.delta)
        switch("LikelihoodControl", "legacy", self.legacy)

    def weights(self, loss: Tensor) -> Tensor:
        """w_s = 1 where l_s < delta and 0 elsewhere, from the summed NLLs."""
        return (loss.detach() < self.delta).to(loss)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        check_one_answer(batch[FORGET], "LikelihoodControl")

        def loss() -> Tensor:
            summed = sequence_nll(model, batch[FORGET])
            count = self.weights(summed).sum().clamp(min=1) if self.legacy else len(summed)
            return F.relu(self.delta - summed).sum() / count

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {} if self.legacy else {FORGET: Reduction(FORGET, "sequence_sum")}

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        check_one_answer(batch[FORGET], "LikelihoodControl")
        return self.weights(-sequence_sum(log_p, scored))


@dataclass(frozen=True)
class CappedAscent(WeightedLikelihood):
    """GA up to a cap: (1/N) sum_i max(log p_i, -cap), ascent that ends where a token is unlikely.

    Token mean, in nats per token, over all N. A token with an NLL above `cap` has no gradient any
    more, the others have that of GA: no single token carries the mean, which falls to -cap at most.
    It is likelihood control with tokens in place of answers. Guessing has an NLL of ln V.

    >>> CappedAscent(cap=5.0)
    CappedAscent(cap=5.0)
    """

    source = "arXiv 2406.09179 by tokens"

    cap: float = 7.0

    def __post_init__(self) -> None:
        positive("CappedAscent", "cap", self.cap)

    def weights(self, log_p: Tensor) -> Tensor:
        """w_i = 1 where the NLL of a token is at most the cap, and 0 elsewhere."""
        return (log_p.detach() >= -self.cap).to(log_p)

    def terms(self, log_p: Tensor) -> Tensor:
        """max(log p_i, -cap)."""
        return log_p.clamp(min=-self.cap)


@dataclass(frozen=True)
class TemperedAscent(Objective):
    """GA at a temperature: (1/N) sum_i log softmax(z_i / T)[y_i] on the forget batch.

    Token mean, in nats per token. z are the logits and y the labels; T above 1 flattens what is
    ascended on, so that a label that is nearly certain has a gradient still. T = 1 is GA. Its
    gradient is no multiple of grad log p: it has no weights.

    >>> TemperedAscent(temperature=1.5)
    TemperedAscent(temperature=1.5)
    """

    source = "arXiv 2406.09179, public code"
    unbounded = True

    temperature: float = 2.0

    def __post_init__(self) -> None:
        positive("TemperedAscent", "temperature", self.temperature)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        def loss() -> Tensor:
            logits, labels = label_logits(model, batch[FORGET])
            flat = logits.to(at_least_float32(logits)) / self.temperature
            return token_mean(log_likelihood(flat, labels), labels != IGNORED)

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}


@dataclass(frozen=True)
class LowestLossAscent(Objective):
    """GA on the likeliest tokens: the mean of log p_i over the `fraction` of each answer.

    Of an answer of n tokens the floor(fraction n) with the lowest NLL count, one at least; of equal
    ones those that come first. The mean is over all that count in the batch, in nats per token.
    fraction = 1 is GA. The public code lets no token of a short answer count, and divides by zero
    where that is all of a batch.

    >>> LowestLossAscent(fraction=0.5)
    LowestLossAscent(fraction=0.5)
    """

    source = "arXiv 2406.09179, public code"
    unbounded = True

    fraction: float = 0.8

    def __post_init__(self) -> None:
        positive("LowestLossAscent", "fraction", self.fraction)
        if self.fraction > 1:
            raise ValueError(
                "`fraction` of LowestLossAscent should be at most 1, all tokens. Found "
                f"`fraction = {self.fraction!r}`. Pass a number such as 0.8."
            )

    def weights(self, log_p: Tensor, scored: Tensor) -> Tensor:
        """w_i = 1 for the tokens that count and 0 for others, `Float[sample, position]`."""
        nll = (-log_p.detach()).masked_fill(~scored, torch.inf)
        rank = nll.argsort(dim=1, stable=True).argsort(dim=1)
        count = share_of(scored.sum(dim=1, keepdim=True), self.fraction)
        return (scored & (rank < count)).to(log_p)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        check_one_answer(batch[FORGET], "LowestLossAscent")

        def loss() -> Tensor:
            log_p, scored = token_log_probabilities(model, batch[FORGET])
            return token_mean(log_p, self.weights(log_p, scored).bool())

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean", fraction=self.fraction)}

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        check_one_answer(batch[FORGET], "LowestLossAscent")
        return self.weights(log_p, scored)[scored]
