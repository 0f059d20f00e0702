"""PDU: primal-dual unlearning, flat logits on forget data under a bound on the retain risk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from geffect import distributed
from geffect.batch import IGNORED, Batch, Pair, labels_of, side_of
from geffect.risk import inputs_of, label_logits, nll, token_mean
from geffect.risk.likelihood import at_least_float32
from geffect.sources import FORGET, RETAIN

from .base import Component, Objective, Reduction, begun, not_negative, switch
from .of_run import OfRun
from .reference import Reference


class Dual(OfRun):
    """The dual variable alpha_t of a run, by which the retain risk is weighed at step t.

    Its value stands in every row of a file, among the implicit weights as `dual variable`.
    """

    def __init__(self, options: "PDU") -> None:
        self._options = options
        self.value = float(options.dual)
        self.bound = options.epsilon
        self.steps = 0
        self._sum: Tensor | float = 0.0
        self._count = 0

    def see(self, risk: Tensor) -> None:
        """Take the retain risk of a micro-batch into account, of one that is trained on."""
        if torch.is_grad_enabled():
            self._sum, self._count = self._sum + risk.detach().double(), self._count + 1

    @property
    def values(self) -> Mapping[str, float]:
        return {"dual variable": self.value}

    def advance(self) -> None:
        """alpha <- max(0, alpha + step (R_r - epsilon)), once for the micro-batches since."""
        if not self._count:
            return
        (risk,) = distributed.mean([float(self._sum) / self._count])
        self._sum, self._count, self.steps = 0.0, 0, self.steps + 1
        if self.bound is None:
            self.bound = risk + self._options.rise
        if self.steps > self._options.warmup:
            # In this order a risk that is no number is not taken for 0.
            self.value = max(self.value + self._options.step * (risk - self.bound), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "bound": self.bound, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.bound, self.steps = state["value"], state["bound"], state["steps"]


@dataclass(frozen=True)
class PDU(Objective):
    """PDU: the mean over forget tokens of (max_v z - mean_v z)^2, plus alpha_t R(retain).

    Over the answer tokens: z are the logits that predict a token, and v goes over the vocabulary;
    the risk is the NLL. Token means both, and in float32 or finer. The dual variable alpha_t keeps
    R(retain) <= epsilon: after each step of the optimizer

        alpha <- max(0, alpha + step (R(retain) - epsilon)),

    with the mean of the risks of its micro-batches and processes. Its value stands in every row of
    a file. It changes where the objective was begun, as trainer and study do it; in a replay, which
    takes no step, alpha is `dual`. Logits are made flat, and no log p is weighed.

    - `dual`: alpha at the start.
    - `step`: that of the dual variable.
    - `epsilon`: the bound in nats per token, as the source has it, which gives no default.
    - `rise`: where `epsilon` is left out, how far the risk may rise above that of the first step.
    - `warmup`: how many steps alpha stays at `dual`.
    - `legacy_mask`: scores the logits at the answer tokens in place of those that predict them, as
      the public code does: the first is left out, and the one behind the answer comes in.

    The public code updates alpha at each micro-batch, and counts its warm-up in epochs.

    >>> PDU(epsilon=0.5).sides
    ('forget', 'retain')
    """

    source = "open-unlearning, PDU"
    sides = (FORGET, RETAIN)

    dual: float = 1.0
    step: float = 1.0
    epsilon: float | None = None
    rise: float = 0.1
    warmup: int = 0
    legacy_mask: bool = False
    variable: Dual | None = field(
        default_factory=lambda: None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("dual", "step", "rise", "warmup"):
            not_negative("PDU", name, getattr(self, name))
        if self.warmup != int(self.warmup):
            raise ValueError(
                "`warmup` of PDU should be a whole number of steps. Found "
                f"`warmup = {self.warmup!r}`. Pass, say, PDU(warmup=2)."
            )
        if self.epsilon is not None:
            not_negative("PDU", "epsilon", self.epsilon)
        switch("PDU", "legacy_mask", self.legacy_mask)

    def begin(self, model: Any) -> Self:
        """The objective with a dual variable at its start."""
        return begun(self, variable=Dual(self))

    @property
    def of_run(self) -> Mapping[str, OfRun]:
        return {} if self.variable is None else {"pdu_dual": self.variable}

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        def flat() -> Tensor:
            of_batch = _at_answers if self.legacy_mask else _before_answers
            logits, scored = of_batch(model, side_of(batch, FORGET))
            z = logits.to(at_least_float32(logits))
            return token_mean((z.amax(dim=-1) - z.mean(dim=-1)).square(), scored)

        def retained() -> Tensor:
            risk = nll(model, side_of(batch, RETAIN))
            if self.variable is None:
                return self.dual * risk
            self.variable.see(risk)
            return self.variable.value * risk

        # Not a weight of the risk: those are the same in all steps of a run.
        return {FORGET: Component(flat), RETAIN: Component(retained)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        own = {} if self.legacy_mask else {FORGET: Reduction(FORGET, "token_mean")}
        return {**own, RETAIN: Reduction(RETAIN, "token_mean")}


def _before_answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits that predict a label, and where there is one."""
    logits, labels = label_logits(model, batch)
    return logits, labels != IGNORED


def _at_answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits at the labels, and where there is one."""
    return model(**inputs_of(model, batch)).logits, labels_of(batch) != IGNORED
