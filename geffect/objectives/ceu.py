"""CEU: the cross-entropy towards the model's own prediction without the true token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import IGNORED, Pair, behind_first
from geffect.numbers import is_whole
from geffect.risk import at_least_float32, label_logits
from geffect.sources import FORGET

from .base import Component, Objective, Reduction
from .reference import Reference


@dataclass(frozen=True)
class CEU(Objective):
    """CEU, cross-entropy unlearning: the unlikelihood -(1/N) sum_i log(1 - p_i).

    Token mean, without the first `skip` answer tokens of each answer, 1 as in the public code
    (open-unlearning), since what begins an answer is seldom what it gives away.

    The public loss is CE(q, p), where q is p without the true token, held constant. It is this plus
    the entropy H(q), whose gradient is none: gradients and G-effects are the same, the value here
    is smaller by H(q), and goes to 0 as the tokens are forgotten. The gradient on the logit of the
    true token is p_i: bounded, and gone with p_i. It is that of the mean log-likelihood with the
    weights p_i / (1 - p_i). It needs no reference and, in the public code, no retain term.

    >>> CEU(skip=0)
    CEU(skip=0)
    """

    source = "arXiv 2503.01224"

    skip: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.skip, 0):
            raise ValueError(
                "`skip` of CEU should be how many tokens at the start of an answer take no part, 0 "
                f"or more. Found `skip = {self.skip!r}`. Pass, say, CEU(skip=1)."
            )

    def weights(self, log_odds: Tensor) -> Tensor:
        """w_i = p_i / (1 - p_i), from its logarithm, detached."""
        return log_odds.detach().double().exp()

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {FORGET: Component(lambda: F.softplus(self._log_odds(model, batch)).mean())}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {FORGET: Reduction(FORGET, "token_mean", skip=self.skip)}

    def implicit_weights(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Tensor]:
        """The "weight" of every token that takes part, and 1/p of all answer tokens."""
        with torch.no_grad():
            # From the logits: of p alone, p / (1 - p) is infinite where p rounds to 1.
            weights = self.weights(self._log_odds(model, batch))
        return {"weight": weights, **super().implicit_weights(model, batch, reference)}

    def _log_odds(self, model: Any, batch: Pair) -> Tensor:
        """log(p_i / (1 - p_i)) of the tokens that take part, `Float[token]`."""
        logits, labels = label_logits(model, batch[FORGET])
        taken = behind_first(labels != IGNORED, batch[FORGET], self.skip)
        if not taken.any():
            raise ValueError(
                f"`{FORGET}` should have an answer of more than {self.skip} scored tokens for "
                f"{self!r}. Found none in {len(labels)} samples. Pass a smaller `skip`, or longer "
                "answers."
            )
        true, chosen = labels[taken][:, None], logits[taken]
        chosen = chosen.to(at_least_float32(chosen))
        others = chosen.scatter(-1, true, -torch.inf).logsumexp(-1)
        return chosen.gather(-1, true).squeeze(-1) - others
