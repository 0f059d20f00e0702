"""Objectives that first learn what is to go, so that the step is turned around afterwards.

The model is trained on one of them from theta_o to theta_1, and what it has learned is taken away:
theta_u = theta_o - alpha (theta_1 - theta_o). So the forget risk falls while they are minimised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geffect.batch import Pair, check_one_answer, side_of
from geffect.data.others import others
from geffect.numbers import is_whole
from geffect.risk import (
    nll,
    sequence_sum,
    token_log_probabilities,
    token_mean,
)
from geffect.sources import FORGET, RETAIN

from . import kl
from .base import Component, Objective, Reduction, positive
from .reference import Reference


@dataclass(frozen=True)
class SSUAcquire(Objective):
    """SSU's learning step: R(forget) + eps mean_s mean_k of the NLL of random answer k, by samples.

    R is the NLL of the answers, a token mean: the part `answers`. In the part `random_answers` each
    question is paired with `answers` random ones of the same pool, `forget.random1` and so on,
    which `geffect.data.others` draws; each of these counts by the mean NLL of its tokens. Sum the
    gradient of both, select its coordinates by `geffect.projection.SaliencyMask(c=1.0)`, and take
    the way from theta_o away afterwards.

    The public code takes the answer's start from the wrong length, so that its random part covers
    nearly all of the sequence, and lets one more backward pass run into the masked gradient.

    >>> SSUAcquire(answers=2).sides
    ('forget', 'forget.random1', 'forget.random2')
    """

    source = "arXiv 2406.10952"

    eps: float = 0.5
    answers: int = 3

    def __post_init__(self) -> None:
        positive("SSUAcquire", "eps", self.eps)
        _check_count("SSUAcquire", self.answers)

    @property
    def sides(self) -> tuple[str, ...]:
        return (FORGET, *_sides(self.answers))

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        return {
            "answers": Component(partial(nll, model, batch[FORGET]), risk=FORGET),
            "random_answers": Component(_of_others(model, batch, self.answers), self.eps),
        }

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {
            "answers": Reduction(FORGET, "token_mean"),
            "random_answers": Reduction(_sides(1)[0], "sample_mean"),
        }


@dataclass(frozen=True)
class SKU(Objective):
    """SKU's learning step: `distortion` L_GD + `disassociation` L_RD + `divergence` L_PD.

    - L_GD, the part `guided_distortion`: the NLL of harmful answers, those of the forget set, a
      token mean.
    - L_RD, `random_disassociation`: mean_s mean_k of the NLL of `answers` random harmful answers to
      the same question, `forget.random1` and so on, which `geffect.data.others` draws; each counts
      by the mean NLL of its tokens.
    - L_PD, `preservation_divergence`: -(1/N) sum_i KL(p_o || p_theta) over the answer tokens of the
      retain set, the normal prompts: it drives the model away from the reference.

    L_PD has no lower bound: training may run away along it until a loss is not finite, which is
    refused. With a `cap`, in nats, the KL of a token counts up to that, and has no gradient beyond;
    0 is none, as in the paper. Weights are those of the public code; its scripts have 0.5, 1 and 1.
    It takes the start of an answer from the padded length, and so scores padding where a tokenizer
    has a maximum length. Its L_GD is a mean over samples.

    >>> SKU(cap=10.0).reference, len(SKU().sides)
    ('logits', 7)
    """

    source = "arXiv 2402.10058"
    reference = "logits"

    distortion: float = 2.5
    disassociation: float = 2.5
    divergence: float = 1.0
    answers: int = 5
    cap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("distortion", "disassociation", "divergence"):
            positive("SKU", name, getattr(self, name))
        _check_count("SKU", self.answers)
        if self.cap != 0.0:
            positive("SKU", "cap", self.cap)

    @property
    def sides(self) -> tuple[str, ...]:
        return (FORGET, *_sides(self.answers), RETAIN)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)

        def away() -> Tensor:
            values, scored = kl.of_answers(model, batch[RETAIN], known)
            return -token_mean(values.clamp(max=self.cap) if self.cap else values, scored)

        return {
            "guided_distortion": Component(
                partial(nll, model, batch[FORGET]), self.distortion, risk=FORGET
            ),
            "random_disassociation": Component(
                _of_others(model, batch, self.answers), self.disassociation
            ),
            "preservation_divergence": Component(away, self.divergence),
        }

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {
            "guided_distortion": Reduction(FORGET, "token_mean"),
            "random_disassociation": Reduction(_sides(1)[0], "sample_mean"),
            "preservation_divergence": Reduction(RETAIN, "token_mean"),
        }


def _sides(count: int) -> tuple[str, ...]:
    """Where the answers of other rows are."""
    return tuple(f"{FORGET}.{name}" for name in others(count))


def _of_others(model: Any, batch: Pair, count: int) -> Any:
    """The loss on answers of other rows: the mean over samples and answers of the mean NLL."""
    batches = [side_of(batch, side) for side in _sides(count)]
    for one in batches:
        check_one_answer(one, "answers of other rows")

    def loss() -> Tensor:
        return torch.stack([_by_samples(model, one) for one in batches]).mean()

    return loss


def _by_samples(model: Any, batch: Any) -> Tensor:
    log_p, scored = token_log_probabilities(model, batch)
    means = sequence_sum(log_p, scored) / scored.sum(dim=1).clamp(min=1)
    return -token_mean(means, scored.any(dim=1))


def _check_count(owner: str, count: int) -> None:
    if not is_whole(count, 1):
        raise ValueError(
            f"`answers` of {owner} should be how many random answers a question is paired with, at "
            f"least 1. Found `answers = {count!r}`. Pass a number such as {owner}(answers=3)."
        )
