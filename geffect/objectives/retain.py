"""Regularisers, which keep what should stay, and objectives with one beside their forget loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from geffect.batch import Pair, side_of
from geffect.risk import nll
from geffect.sources import RETAIN

from .base import Component, Objective, Reduction, begun, positive
from .likelihood import GradientAscent
from .of_run import OfRun
from .reference import NEEDS, Need, Reference


@dataclass(frozen=True)
class GradientDescent(Objective):
    """GD: the risk on the retain batch, its NLL, which training goes on to lower.

    >>> GradientDescent().sides
    ('retain',)
    """

    sides = (RETAIN,)

    @property
    def risks(self) -> Mapping[str, float]:
        return {RETAIN: 1.0}

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {RETAIN: Component(partial(nll, model, side_of(batch, RETAIN)), risk=RETAIN)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {RETAIN: Reduction(RETAIN, "token_mean")}


@dataclass(frozen=True)
class Regularised(Objective):
    """`forget` plus `weight` times `regulariser`, each an objective of its own.

    >>> Regularised(GradientAscent(), GradientDescent(), weight=0.5).sides
    ('forget', 'retain')
    """

    forget: Objective
    regulariser: Objective
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive(type(self).__name__, "weight", self.weight)
        for name, part in (("forget", self.forget), ("regulariser", self.regulariser)):
            if not isinstance(part, Objective):
                raise TypeError(
                    f"`{name}` of {type(self).__name__} should be an Objective. Found {part!r}. "
                    "Pass one of geffect.objectives, such as NPO(beta=0.1)."
                )

    @property
    def reference(self) -> Need:
        return max(self.forget.reference, self.regulariser.reference, key=NEEDS.index)

    @property
    def risks(self) -> Mapping[str, float] | None:
        own, added = self.forget.risks, self.regulariser.risks
        if own is None or added is None:
            return None
        return {**own, **{side: self.weight * weight for side, weight in added.items()}}

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.forget.sides, *self.regulariser.sides)))

    @property
    def source(self) -> str:
        return self.forget.source

    def begin(self, model: Any) -> Self:
        """With both parts begun."""
        return begun(
            self, forget=self.forget.begin(model), regulariser=self.regulariser.begin(model)
        )

    @property
    def keeps(self) -> frozenset[str]:
        return self.forget.keeps | self.regulariser.keeps

    @property
    def unbounded(self) -> bool:
        return self.forget.unbounded or self.regulariser.unbounded

    @property
    def of_run(self) -> Mapping[str, OfRun]:
        return {**self.forget.of_run, **self.regulariser.of_run}

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        parts = self.forget.components(model, batch, reference)
        added = self.regulariser.components(model, batch, reference)
        both = [name for name in parts if name in added]
        if both:
            raise ValueError(
                f"The parts of {type(self).__name__} should have names of their own. Found "
                f"{', '.join(f'`{name}`' for name in both)} in `forget` and in `regulariser`. "
                "Leave one of them out."
            )
        return parts | {
            name: replace(part, weight=self.weight * part.weight) for name, part in added.items()
        }

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {**self.forget.reductions, **self.regulariser.reductions}

    def implicit_weights(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Tensor]:
        """Those of `forget`, and what either part has of the step."""
        return self.forget.implicit_weights(model, batch, reference) | self.of_step()


@dataclass(frozen=True)
class GradDiff(Regularised):
    """Gradient difference: `forget` plus `weight` times the NLL of the retain batch.

    With the default GA this is -R(forget) + weight R(retain), token means; with NPO it is NPO+GD.

    >>> GradDiff(weight=0.5)
    GradDiff(forget=GradientAscent(), weight=0.5)
    """

    forget: Objective = field(default_factory=GradientAscent)
    regulariser: Objective = field(default_factory=GradientDescent, init=False, repr=False)
