"""One edit of the study, as strong as it has to be, measured and recorded."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from geffect import record_edit
from geffect.edits import Change, Edit, Strength, Varied, named, options_of
from geffect.layers import trainable
from geffect.objectives import FrozenModel, SharedForward, as_objective
from geffect.objectives.kl import of_answers
from geffect.projection import SaliencyMask

from . import language_model as lm
from .config import UnlearningConfig
from .data import Data
from .edits import DISRUPTION, Lesson, StudiedEdit
from .measures import Metrics, measure, relearn
from .recognised import recognised
from .scales import on_common_scales

LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Subject:
    """The model that is edited, its facts, and how it is trained."""

    model: PreTrainedModel
    data: Data
    config: UnlearningConfig


def edited(subject: Subject, studied: StudiedEdit, level: float, path: Path) -> dict[str, Any]:
    """What summary.json says of an edit: at equal forgetting, and at equal disruption.

    The strength is found by bisection. The run file is of the strength at equal forgetting, else at
    equal disruption; there is none where neither is reached.
    """
    model, data = subject.model, subject.data
    edit = named(studied.edit, studied.options)
    varied, of_other = _varied(subject, studied, edit)
    known = FrozenModel.copied(model)
    forgetting = varied.reaching(_forget_nll(data), level=level, between=studied.between)
    disruption = varied.reaching(
        lambda edited: _divergence(edited, data, known),
        level=DISRUPTION,
        between=studied.between,
    )
    at_level = _measured(varied, subject, forgetting)
    at_disruption = _measured(varied, subject, disruption)
    chosen = forgetting if forgetting.value is not None else disruption
    if chosen.value is not None:
        path.unlink(missing_ok=True)
        record_edit(
            model,
            varied.change(chosen.value),
            path,
            risks={name: data.batches[name] for name in ("forget", "retain")},
            edit=edit,
            metadata={"strength": {studied.strength: chosen.value}},
        )
    return {
        "reached_level": at_level is not None,
        "highest_forget_nll": max(nll for _, nll in forgetting.curve),
        "at_level": at_level,
        "at_es": None,
        "at_disruption": at_disruption,
        **of_other,
        "options": {**options_of(edit), studied.strength: None},
        "curve": _curve(varied, subject, forgetting),
        "g_effects": None if chosen.value is None else on_common_scales(path),
    }


def learned(subject: Subject, lesson: Lesson) -> tuple[PreTrainedModel, float | None]:
    """A copy of the model after some steps of AdamW on an objective.

    And which part of the coordinates a step is on, their mean, where a mask chooses them.
    """
    student = copy.deepcopy(subject.model)
    objective = as_objective(lesson.objective).begin(student)
    reference = None if objective.reference == "none" else FrozenModel.copied(subject.model)
    parameters = list(trainable(student).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = subject.data.draws(subject.config.sizes(("retain",)), objective.sides)
    stepped = []
    for _ in range(lesson.steps):
        optimizer.zero_grad()
        objective(SharedForward(student), next(batches), reference).backward()
        if lesson.masked:
            stepped.append(_mask(parameters))
        optimizer.step()
        objective.advance()
    optimizer.zero_grad()
    return student, fmean(stepped) if stepped else None


def _mask(parameters: Sequence[torch.Tensor]) -> float:
    """SSU's mask of the gradients; which part of all coordinates it leaves."""
    select, gradients = SaliencyMask(c=1.0), [parameter.grad for parameter in parameters]
    threshold = select.threshold(gradients, lambda index: None, torch.Generator())
    left = 0
    for gradient in gradients:
        if gradient is not None:
            mask = select.mask(gradient, None, threshold)
            gradient.mul_(mask)
            left += int(mask.sum())
    return left / sum(parameter.numel() for parameter in parameters)


def _varied(subject: Subject, studied: StudiedEdit, edit: Edit) -> tuple[Varied, dict[str, Any]]:
    """The model edited at any strength, and what is told of another that it is made from."""
    model, data = subject.model, subject.data
    given: dict[str, Any] = {name: data.batches[name] for name in edit.sets}
    told: dict[str, Any] = {"before": None, "stepped": None}
    if studied.lesson is None:
        return Varied.of(edit, studied.strength, model, given), told
    other, stepped = learned(subject, studied.lesson)
    told = {"before": measure(other, data), "stepped": stepped}
    if not studied.swapped:
        given[studied.state] = other
        return Varied.of(edit, studied.strength, model, given), told
    back = Varied.of(edit, studied.strength, other, {**given, studied.state: model})

    def change(strength: float) -> Change:
        with back.change(strength):
            return Change(model, {n: p.detach().clone() for n, p in trainable(other).items()})

    return Varied(model, change), told


def _forget_nll(data: Data) -> Callable[[nn.Module], float]:
    return lambda model: lm.nll(model, data.batches["forget"])  # type: ignore[arg-type]


@torch.no_grad()
def _divergence(model: nn.Module, data: Data, known: FrozenModel) -> float:
    """KL(p_before || p), a mean over the answer tokens of the retain set, in nats."""
    total, count = torch.zeros(()), torch.zeros(())
    for batch in data.batches["retain"]:
        values, scored = of_answers(model, batch, known)
        total, count = total + values.sum(), count + scored.sum()
    return float(total / count)


def _measured(varied: Varied, subject: Subject, found: Strength) -> Metrics | None:
    """Everything that the tables say of the edited model; None where no strength does it."""
    if found.value is None:
        return None
    model, data = subject.model, subject.data
    with varied.change(found.value):
        return {
            "step": None,
            "strength": found.value,
            **measure(model, data),
            "relearn_nll": relearn(model, data, subject.config),
            **recognised(model, data.asked, data.tokenizer, subject.config),
            **data.judged(model),
        }


def _curve(varied: Varied, subject: Subject, found: Strength) -> dict[str, list[float]]:
    """Losses at the strengths up to that of the level, for the picture."""
    points: list[dict[str, float]] = []
    data = subject.data
    for strength, nll in found.curve:
        if strength > (found.value or math.inf) or not math.isfinite(nll):
            continue
        with varied.change(strength):
            kept = {
                f"{name}_nll": lm.nll(subject.model, data.batches[name])
                for name in ("retain", "retain_heldout_authors")
            }
        points.append({"step": len(points), "strength": strength, "forget_nll": nll, **kept})
    return {name: [point[name] for point in points] for name in points[0]} if points else {}
