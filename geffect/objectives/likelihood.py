"""Objectives that lower the likelihood of the forget tokens: GA, and WGA that weighs by confidence.

Formulas: "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond"
(arXiv 2502.19301).
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from geffect.batch import Pair
from geffect.risk import nll, token_log_probabilities, token_mean
from geffect.sources import FORGET

from .base import Component, Objective, Reduction, positive
from .reference import Reference


@dataclass(frozen=True)
class GradientAscent(Objective):
    """GA: the mean log-likelihood of the forget tokens, (1/N) sum_i log p_i.

    Token mean, in nats per token. Its gradient is minus that of the forget risk, and it is not
    bounded below.

    >>> GradientAscent()
    GradientAscent()
    """

    source = "arXiv 2502.19301"
    unbounded = True

    @property
    def risks(self) -> Mapping[str, float]:
        return {FORGET: -1.0}

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {FORGET: Component(partial(nll, model, batch[FORGET]), -1.0, risk=FORGET)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}


@dataclass(frozen=True)
class WeightedLikelihood(Objective):
    """(1/N) sum_i w_i log p_i, token mean, with weights of p_i alone that are held constant.

    >>> @dataclass(frozen=True)
    ... class Halved(WeightedLikelihood):
    ...     def weights(self, log_p):
    ...         return 0.5 * log_p.detach().exp()
    >>> Halved().reductions["forget"].kind
    'token_mean'
    """

    @abstractmethod
    def weights(self, log_p: Tensor) -> Tensor:
        """w_i from log p_i, detached."""

    def terms(self, log_p: Tensor) -> Tensor:
        """What the mean is of, with the gradient w_i grad log p_i."""
        return self.weights(log_p) * log_p

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        def loss() -> Tensor:
            log_p, scored = token_log_probabilities(model, batch[FORGET])
            return token_mean(self.terms(log_p), scored)

        return {FORGET: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean")}

    def _weights_of(
        self, batch: Pair, log_p: Tensor, scored: Tensor, reference: Reference | None
    ) -> Tensor:
        return self.weights(log_p)[scored]


@dataclass(frozen=True)
class WeightedGradientAscent(WeightedLikelihood):
    """WGA: (1/N) sum_i w_i log p_i with w_i = p_i^alpha held constant in the gradient.

    Token mean. The weight cancels the 1/p by which GA grows on what is already forgotten, so WGA
    limits itself; alpha = 0 would be GA. The gradient is that of (1/N) sum_i p_i^alpha / alpha.

    >>> WeightedGradientAscent(alpha=2.0)
    WeightedGradientAscent(alpha=2.0)
    """

    source = "arXiv 2502.19301"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        positive("WeightedGradientAscent", "alpha", self.alpha)

    def weights(self, log_p: Tensor) -> Tensor:
        """w_i = p_i^alpha, detached."""
        return (self.alpha * log_p.detach()).exp()
