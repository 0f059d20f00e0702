"""SSD, selective synaptic dampening: shrink what matters for the forget data alone.

"Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening" (AAAI 2024,
arXiv 2308.07707); its form without labels is "Loss-Free Machine Unlearning" (arXiv 2402.19308).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from geffect.batch import Batch
from geffect.layers import trainable
from geffect.numbers import is_number, is_whole
from geffect.risk import nll
from geffect.sources import FORGET, RETAIN

from .base import Data, Edit, Outcome
from .importance import Loss, check_answered, mean_importance, of_size, output_energy
from .options import check_option, chosen

Against = Literal["retain", "all"]

ALPHA = 10.0
"""The paper's, of a ResNet18."""

ALIKE = 1e-12
"""How far ratios that are equal may differ, by the rounding of their sums."""


@dataclass(frozen=True)
class _Importances:
    """I_f, what it is compared with, and how many batches each is a mean of."""

    forget: dict[str, Tensor]
    other: dict[str, Tensor]
    batches: dict[str, int]


@dataclass(frozen=True)
class SSD(Edit):
    """SSD: theta_i <- min(lambda I_r,i / I_f,i, 1) theta_i for all i with I_f,i > alpha I_r,i.

    I_f and I_r are diagonals of the Fisher information of forget and retain data: means over
    batches of the squared gradient of the NLL, a token mean.

    - `alpha`: how many times more important for the forget data a number has to be, 10 where
      `fraction` is not given either. It does not carry over between models.
    - `fraction`: in its place, which part of the numbers is selected, those with the largest
      I_f / I_r, and among equal ones, such as infinite ones, those with the largest I_f.
    - `dampening`: lambda, 1 by default.
    - `against`: whose importance I_r is: "retain", or "all" for the rows of both sets, as in the
      paper. With "all" the ratio is at most the number of all rows over that of forget rows.
    - `fisher_batch`: rows in a batch of either set, whose gradient is squared; 1 by default. The
      Fisher of batches of B is mu^2 + sigma^2 / B: other sizes select other numbers.
    - `include`, `exclude`: patterns of the names of parameters, with commas between them.

    Needs memory for two float64 copies of the parameters that may be selected.

    >>> SSD(fraction=0.01, exclude="*norm*, *bias")
    SSD(alpha=None, fraction=0.01, dampening=1.0, against='retain', fisher_batch=1, ...)
    """

    alpha: float | None = None
    fraction: float | None = None
    dampening: float = 1.0
    against: Against = "retain"
    fisher_batch: int = 1
    include: str = "*"
    exclude: str = ""

    def __post_init__(self) -> None:
        if self.alpha is not None:
            threshold = self.alpha == inf or (is_number(self.alpha) and self.alpha > 0)
            check_option(self, "alpha", threshold, "positive")
            alone, do = self.fraction is None, "Leave one of the two out."
            check_option(self, "alpha", alone, "left out beside `fraction`", do)
        if self.fraction is not None:
            within = is_number(self.fraction) and 0 < self.fraction <= 1
            check_option(self, "fraction", within, "above 0 and at most 1")
        finite = is_number(self.dampening) and self.dampening >= 0
        check_option(self, "dampening", finite, "0 or a positive number")
        check_option(self, "against", self.against in get_args(Against), '"retain" or "all"')
        check_option(
            self, "fisher_batch", is_whole(self.fisher_batch, 1), "a whole number from 1 on"
        )

    @property
    def sets(self) -> tuple[str, ...]:
        return (FORGET, RETAIN)

    @property
    def source(self) -> str:
        return "arXiv 2308.07707"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        return self._dampened(model, self._importances(model, data))

    def varied(self, option: str, model: nn.Module, data: Data) -> Callable[[float], Outcome]:
        # Importances depend on none of the options that say how strong it is.
        if option not in ("alpha", "fraction", "dampening"):
            return super().varied(option, model, data)
        measured = self._importances(model, data)
        return lambda value: self.with_option(option, value)._dampened(model, measured)

    def _importances(self, model: nn.Module, data: Data) -> "_Importances":
        names = chosen(self, trainable(model))
        sets = {name: of_size(name, data[name], self.fisher_batch) for name in self.sets}
        check_answered(model, sets)
        compared = sets[RETAIN] if self.against == "retain" else [*sets[RETAIN], *sets[FORGET]]
        return _Importances(
            self._importance(model, sets[FORGET], names),
            self._importance(model, compared, names),
            {"forget": len(sets[FORGET]), self.against: len(compared)},
        )

    def _dampened(self, model: nn.Module, measured: "_Importances") -> Outcome:
        forget, other = measured.forget, measured.other
        masks, how = self._selected(forget, other)
        parameters = trainable(model)
        values = {
            name: _dampened(parameters[name], mask, self.dampening * other[name] / forget[name])
            for name, mask in masks.items()
            if mask.any()
        }
        facts = {
            **how,
            "selected": sum(int(mask.sum()) for mask in masks.values()),
            "among": sum(mask.numel() for mask in masks.values()),
            "importance": f"{self._kind}, a mean over batches of {self.fisher_batch}",
            "batches": measured.batches,
        }
        return Outcome(values, facts)

    @property
    def _kind(self) -> str:
        return "squared gradient of the token-mean NLL"

    def _importance(
        self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str]
    ) -> dict[str, Tensor]:
        loss: Loss = nll
        return mean_importance(model, batches, loss, torch.square, names)

    def _selected(
        self, forget: Mapping[str, Tensor], other: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A mask for each parameter, and by what the numbers were selected."""
        if self.fraction is None:
            alpha = ALPHA if self.alpha is None else self.alpha
            masks = {name: own > alpha * other[name] for name, own in forget.items()}
            largest = max(_ratios(own, other[name]).max().item() for name, own in forget.items())
            return masks, {"alpha": _told(alpha), "largest_ratio": _told(largest)}
        ratios = {name: _ratios(own, other[name]) for name, own in forget.items()}
        whole = torch.cat([ratio.flatten().cpu() for ratio in ratios.values()])
        count, there = max(1, round(self.fraction * len(whole))), int((whole > 0).sum())
        if count > there:
            raise ValueError(
                f"`fraction` of {type(self).__name__} should be of numbers that the forget data "
                f"has an importance for: {there / len(whole):.3g} of them. Found {self.fraction}. "
                "Choose a smaller fraction."
            )
        threshold = whole.kthvalue(len(whole) - count + 1).values.item()
        least_alike, most_alike = threshold * (1 - ALIKE), threshold * (1 + ALIKE)
        masks = {name: ratio >= least_alike for name, ratio in ratios.items()}
        if int((whole >= least_alike).sum()) > count:  # more than were asked for have that ratio
            strengths = {
                name: torch.where(ratio > most_alike, inf, forget[name]).where(masks[name], 0.0)
                for name, ratio in ratios.items()
            }
            every = torch.cat([strength.flatten().cpu() for strength in strengths.values()])
            least = every.kthvalue(len(every) - count + 1).values.item()
            masks = {name: strength >= least for name, strength in strengths.items()}
        return masks, {"alpha": _told(threshold)}


@dataclass(frozen=True)
class LFSSD(SSD):
    """LFSSD, SSD without labels: the same with I the mean |gradient| of the mean |logits|^2.

    The labels tell which positions are answers, and not what the answers are. Options are those of
    SSD.

    >>> LFSSD(alpha=5.0).source
    'arXiv 2402.19308'
    """

    @property
    def source(self) -> str:
        return "arXiv 2402.19308"

    @property
    def _kind(self) -> str:
        return "absolute gradient of the mean squared length of the logits"

    def _importance(
        self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str]
    ) -> dict[str, Tensor]:
        return mean_importance(model, batches, output_energy, torch.abs, names)


def _ratios(forget: Tensor, other: Tensor) -> Tensor:
    """I_f / I_r; 0 where neither data has any use for a number."""
    return torch.where(forget > 0, forget / other, 0.0)


def _dampened(parameter: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """min(factor, 1) theta where the mask is, and theta elsewhere, to the bit."""
    theta = parameter.detach()
    shrunk = (theta.double() * factor.clamp(max=1.0)).to(theta.dtype)
    return torch.where(mask, shrunk, theta)


def _told(number: float) -> float | str:
    """The number as JSON can hold it."""
    return number if -inf < number < inf else "infinity"
