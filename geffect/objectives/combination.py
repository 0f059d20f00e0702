"""An objective that is nothing but a weighted sum of risks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from geffect.batch import Pair, side_of
from geffect.numbers import is_number
from geffect.risk import nll

from .base import Component, Objective, Reduction
from .reference import Reference


@dataclass(frozen=True)
class Combination(Objective):
    """A weighted sum of the NLLs of sides: sum_k w_k R(k), each a token mean.

    {"forget": -1.0} is GA, {"forget": -1.0, "retain": 1.0} is GradDiff; weights may be of further
    sets, and of answers inside of a side, `forget.alternate`. Where the risks are differentiated
    anyway, it costs no backward pass.

    >>> Combination({"forget": -1.0, "world": 0.5}).sides
    ('forget', 'world')
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        weights = self.weights.values()
        if not (all(map(is_number, weights)) and any(weights)):
            raise ValueError(
                "`weights` of Combination should be finite numbers by the names of sides, not all "
                f'zero. Found {dict(self.weights)!r}. Pass, say, {{"forget": -1.0}}.'
            )

    @property
    def risks(self) -> Mapping[str, float]:
        return {side: float(weight) for side, weight in self.weights.items()}

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {
            side: Component(partial(nll, model, side_of(batch, side)), float(weight), risk=side)
            for side, weight in self.weights.items()
        }

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {side: Reduction(side, "token_mean") for side in self.weights}
