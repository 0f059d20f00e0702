"""How strong an edit has to be for a metric to reach a level, found by bisection."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, isnan

from torch import nn

from .base import Data, Edit, check_given
from .change import Change, check_whole

Metric = Callable[[nn.Module], float]

POINTS = 16
"""Strengths that are tried on the way up, in equal ratios."""

HALVINGS = 14


@dataclass(frozen=True)
class Strength:
    """The strength at which a metric first reaches a level, among those that are tried.

    - `value`: that strength; None where none reaches the level.
    - `reached`: the metric there; None likewise.
    - `curve`: all strengths that were tried, in order, with the metric there.
    """

    value: float | None
    level: float
    reached: float | None
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Varied:
    """An edit of a model at any strength, the value of one of its options.

    - `option`: a number of the edit, such as "alpha"; what does not depend on it is found once.
    - `model`: the one that is edited; it is left as it was.

    >>> import torch
    >>> from geffect.edits import TaskVectorNegation
    >>> before, tuned = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(before.weight, 1.0), nn.init.constant_(tuned.weight, 1.5)
    >>> edit = Varied.of(TaskVectorNegation(), "alpha", before, {"tuned": tuned})
    >>> found = edit.reaching(lambda model: -model.weight.item(), level=0.5, between=(0.1, 10.0))
    >>> round(found.value, 2), round(found.reached, 2)
    (3.0, 0.5)
    """

    model: nn.Module
    change: Callable[[float], Change]

    @classmethod
    def of(cls, edit: Edit, option: str, model: nn.Module, data: Data) -> "Varied":
        check_whole(dict(model.named_parameters()))
        check_given(edit, data)
        outcome = edit.varied(option, model, data)

        def change(value: float) -> Change:
            found = outcome(value)
            return Change(model, found.values, found.facts)

        return cls(model, change)

    def reaching(
        self,
        metric: Metric,
        *,
        level: float,
        between: tuple[float, float],
        tolerance: float = 1e-3,
    ) -> Strength:
        """The least strength at which a metric reaches a level, in steps of equal ratio, bisected.

        A metric that falls again between two of the steps may reach it before.

        - `metric`: called with the edited model; larger where it is edited more. One that is not
          finite counts as beyond the level.
        - `between`: the least and the largest strength that are tried.
        - `tolerance`: how far the metric may be from the level, as a part of it.
        """
        low, high = between
        if not 0 < low < high:
            raise ValueError(
                "`between` should be two positive strengths, the smaller first. Found "
                f"{between}. Pass, say, (0.01, 1.0)."
            )
        values: dict[float, float] = {}

        def at(strength: float) -> float:
            if strength not in values:
                with self.change(strength):
                    values[strength] = float(metric(self.model))
            return values[strength]

        def beyond(strength: float) -> bool:
            return isnan(at(strength)) or at(strength) >= level

        ladder = [low * (high / low) ** (i / (POINTS - 1)) for i in range(POINTS - 1)]
        below = low
        found = None
        for strength in (*ladder, high):
            if beyond(strength):
                found = strength
                break
            below = strength
        for _ in range(HALVINGS if found is not None else 0):
            if found is None or abs(at(found) - level) <= tolerance * abs(level) or below == found:
                break
            middle = (below * found) ** 0.5
            below, found = (below, middle) if beyond(middle) else (middle, found)
        if found is not None and not isfinite(at(found)):
            found = None
        curve = tuple(sorted(values.items()))
        return Strength(found, level, None if found is None else at(found), curve)
