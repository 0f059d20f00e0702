"""Proxy KL: the regulariser that draws the predictions on retain answers to those of a proxy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geffect.batch import Pair
from geffect.risk import token_mean
from geffect.sources import RETAIN

from .base import Component, Objective, Reduction, positive
from .kl import divergence, of_answers
from .reference import Reference

PART = "proxy_kl"
"""The name of its component."""


@dataclass(frozen=True)
class ProxyKL(Objective):
    """Proxy KL: the mean of KL(p_theta^T || p_proxy^T) on the retain batch, p^T = softmax(z / T).

    Over the answer tokens, in nats per token and in float32 or finer; T is `proxy_temperature`. The
    proxy is the reference that is passed: a model that was trained a little on what may stay, of
    the same vocabulary. Left out, it is the model before unlearning, and this is KL the other way
    around. An objective beside it that compares with a reference compares with the same one: GA,
    WGA or SimNPO compare with none. The paper weighs it by 0.5 to 1.

    Unverified: that it is over retain data, and over answer tokens.

    >>> ProxyKL(proxy_temperature=1.0).reference, ProxyKL().sides
    ('logits', ('retain',))
    """

    source = "ConMU, arXiv 2310.18574; the data are unverified"
    reference = "logits"
    sides = (RETAIN,)

    proxy_temperature: float = 2.0

    def __post_init__(self) -> None:
        positive("ProxyKL", "proxy_temperature", self.proxy_temperature)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        proxy = self.compared(reference, model)

        def flat(of_proxy: Tensor, logits: Tensor) -> Tensor:
            return divergence(logits / self.proxy_temperature, of_proxy / self.proxy_temperature)

        return {PART: Component(lambda: token_mean(*of_answers(model, batch[RETAIN], proxy, flat)))}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {PART: Reduction(RETAIN, "token_mean")}
