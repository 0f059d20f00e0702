"""PO: an alternate answer, such as "I don't know", is learned in place of the original."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from geffect.batch import Pair, side_of
from geffect.risk import nll

from .base import Component, Objective, Reduction
from .reference import Reference
from .sides import ALTERNATE


@dataclass(frozen=True)
class PO(Objective):
    """PO, preference optimisation: the NLL of the alternate answers, -(1/N) sum_i log p_i.

    Token mean over the alternates, in nats per token; with "I don't know" as the alternate it is
    also called IDK. The answer that is to be forgotten is in no
    part of it: what happens to that says the forget risk, which is of the original answer and is
    recorded beside the objective. All weights on grad log p are 1, of the tokens of the alternate.

    The older public code (TOFU, `idk`) takes one token mean over the alternates and the retain rows
    together, so that the longer side weighs more; the sum of two means is `GradDiff(PO())`.

    >>> PO().risks
    {'forget.alternate': 1.0}
    """

    source = "arXiv 2401.06121"
    sides = ("forget", ALTERNATE)

    @property
    def risks(self) -> Mapping[str, float]:
        return {ALTERNATE: 1.0}

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {
            ALTERNATE: Component(partial(nll, model, side_of(batch, ALTERNATE)), risk=ALTERNATE)
        }

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {ALTERNATE: Reduction(ALTERNATE, "token_mean")}
