"""SatImp: GA whose tokens are weighed by how far they are from forgotten, and how important."""

from dataclasses import dataclass

from torch import Tensor

from .base import not_negative
from .likelihood import WeightedLikelihood


@dataclass(frozen=True)
class SatImp(WeightedLikelihood):
    """SatImp: (1/N) sum_i w_i log p_i with w_i = p_i^beta1 (1 - p_i)^beta2 held constant.

    Token mean. p^beta1, saturation, spares what is forgotten already, as WGA does; (1 - p)^beta2,
    importance, spares what any context makes certain. beta1 = beta2 = 0 is GA, beta2 = 0 is WGA. It
    needs no reference; the public code (open-unlearning) loads one, and does not use it. There the
    retain term weighs 1 and this 0.1, or the other way round where the configuration is left out:
    `GradDiff(SatImp(), weight=10.0)` is the first but for the size of the learning rate.

    >>> SatImp(beta1=1.0)
    SatImp(beta1=1.0, beta2=1.0)
    """

    source = "arXiv 2505.11953"

    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        not_negative("SatImp", "beta1", self.beta1)
        not_negative("SatImp", "beta2", self.beta2)

    def weights(self, log_p: Tensor) -> Tensor:
        """w_i = p_i^beta1 (1 - p_i)^beta2, detached."""
        known = log_p.detach()
        return (self.beta1 * known).exp() * (-known.expm1()).clamp(min=0).pow(self.beta2)
