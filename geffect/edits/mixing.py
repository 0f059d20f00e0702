"""Model mixing: between a model before unlearning and after it, and how far along is allowed.

"Towards Effective Evaluations and Comparisons for LLM Unlearning Methods" (UWC, arXiv 2406.09179).
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor, nn

from geffect.evaluation import extraction_strength
from geffect.layers import trainable
from geffect.numbers import is_number
from geffect.sources import FORGET, RETAIN

from .base import Data, Edit, Outcome, State, state_of
from .change import Change
from .options import check_option
from .task_vector import check_weights

Metric = Callable[[nn.Module], float]
"""What a model keeps: larger is better, and above 0 before unlearning."""

BEFORE = "before"

POINTS = 11
"""Weights that are tried to see whether a metric falls from one end to the other."""


@dataclass(frozen=True)
class Calibration:
    """The largest weight of the unlearned model that keeps a part of a metric.

    - `alpha`: that weight, from 0 to 1.
    - `original`, `reached`: the metric before unlearning, and at `alpha`.
    - `curve`: all weights that were tried, in order, with the metric there.
    - `monotone`: whether the metric falls, or stays, from each of them to the next.
    """

    alpha: float
    level: float
    original: float
    reached: float
    curve: tuple[tuple[float, float], ...]
    monotone: bool


@dataclass(frozen=True)
class Mixing(Edit):
    """Model mixing: (1 - alpha) theta_before + alpha theta, of a model theta after unlearning.

    `before` is the model before unlearning. The weights 0 and 1 give both models back to the bit.

    - `alpha`: the weight of the unlearned model; by default the largest one, in steps of
      `tolerance`, with which the mean extraction strength on the retain data is at least `level` of
      what it was before. For another metric see `calibrated`.

    Factors of adapters are refused: merge them first. So are models that differ in what has no
    gradient, such as buffers.

    >>> unlearned, before = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(unlearned.weight, 1.0), nn.init.constant_(before.weight, 2.0)
    >>> Mixing(alpha=0.25).displacement(unlearned, {"before": before})
    {'weight': tensor([[0.7500]])}
    """

    alpha: float | None = None
    level: float = 0.95
    tolerance: float = 0.001

    def __post_init__(self) -> None:
        if self.alpha is not None:
            within = is_number(self.alpha) and 0 <= self.alpha <= 1
            check_option(self, "alpha", within, "from 0 to 1")
        check_option(self, "level", is_number(self.level) and 0 < self.level <= 1, "from 0 to 1")
        check_option(
            self, "tolerance", is_number(self.tolerance) and self.tolerance > 0, "positive"
        )

    @property
    def sets(self) -> tuple[str, ...]:
        return (FORGET, RETAIN) if self.alpha is None else ()

    @property
    def states(self) -> tuple[str, ...]:
        return (BEFORE,)

    @property
    def source(self) -> str:
        return "arXiv 2406.09179"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        if self.alpha is not None:
            return Outcome(_mixed(model, data[BEFORE], self.alpha), {"alpha": self.alpha})

        def strength(side: str) -> float:
            return float(extraction_strength(model, data[side]).mean())

        found = calibrated(
            model,
            data[BEFORE],
            lambda _: strength(RETAIN),
            level=self.level,
            tolerance=self.tolerance,
        )
        values = _mixed(model, data[BEFORE], found.alpha)
        forget = {"unlearned": strength(FORGET)}
        for name, alpha in (("original", 0.0), ("mixed", found.alpha)):
            with Change(model, _mixed(model, data[BEFORE], alpha)):
                forget[name] = strength(FORGET)
        told = {"metric": "mean extraction strength", **asdict(found), "forget": forget}
        return Outcome(values, told)


def calibrated(
    model: nn.Module,
    before: State,
    metric: Metric,
    *,
    level: float = 0.95,
    tolerance: float = 0.001,
) -> Calibration:
    """The largest alpha of a mixing with metric(theta_alpha) >= level metric(theta_before).

    A coarse grid finds the last weight that keeps the level, and whether the metric falls from end
    to end; bisection finds where behind it the level is lost. A metric that does not is warned of:
    weights between those that were tried might be larger.

    - `model`: after unlearning; it is left as it was.
    - `before`: the model before unlearning, or its tensors by name.
    - `metric`: called with the model at each weight; above 0 before unlearning.

    >>> unlearned, before = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(unlearned.weight, 1.0), nn.init.constant_(before.weight, 2.0)
    >>> round(calibrated(unlearned, before, lambda model: model.weight.item()).alpha, 2)
    0.1
    """
    Mixing(level=level, tolerance=tolerance)  # refuses what neither can be
    values: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in values:
            with Change(model, _mixed(model, before, alpha)):
                values[alpha] = float(metric(model))
            if not isfinite(values[alpha]):
                raise ValueError(
                    f"`metric` should be finite. Found {values[alpha]} at alpha {alpha:.4g}. See "
                    "whether the mixed model is."
                )
        return values[alpha]

    if at(0.0) <= 0:
        raise ValueError(
            "`metric` should be above 0 before unlearning, and larger where more is kept. Found "
            f"{at(0.0):.4g}. Pass, say, an accuracy, or exp(-loss)."
        )
    wanted = level * at(0.0)
    grid = [i / (POINTS - 1) for i in range(POINTS)]
    low = max(alpha for alpha in grid if at(alpha) >= wanted)
    high = min((alpha for alpha in grid if alpha > low), default=low)
    while high - low > tolerance and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if at(middle) >= wanted else (low, middle)
    curve = tuple(sorted(values.items()))
    kept = [value for _, value in curve]
    monotone = all(a >= b for a, b in pairwise(kept))
    if not monotone:
        warnings.warn(
            "`metric` should fall from the model before unlearning to the one after it. Found that "
            f"it rises in between. The alpha is {low:.4g}; a larger one between those that were "
            "tried might keep the level, too.",
            stacklevel=2,
        )
    return Calibration(low, level, at(0.0), at(low), curve, monotone)


def _mixed(model: nn.Module, given: State, alpha: float) -> dict[str, Tensor]:
    """The values that differ from those of the model."""
    parameters = trainable(model)
    check_weights(parameters, "Mixing")
    before = state_of(BEFORE, given, model)
    if alpha == 1:
        return {}
    return {
        name: _between(before[name], parameter.detach(), alpha)
        for name, parameter in parameters.items()
        if alpha == 0 or not torch.equal(before[name], parameter)
    }


def _between(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return before
    return torch.where(
        before == after, after, (1 - alpha) * before.double() + alpha * after.double()
    )
