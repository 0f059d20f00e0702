"""One edit of the study, as strong as it has to be, measured and recorded."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from geffect import record_edit
from geffect.edits import Change, Edit, Strength, Varied, named, options_of
from geffect.layers import trainable
from geffect.objectives import FrozenModel, SharedForward, as_objective
from geffect.objectives.kl import of_answers
from geffect.projection import SaliencyMask
from geffect.projection.blocks import Blocks
from geffect.projection.masks import Masks

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
    varied, of_other, masked = _varied(subject, studied, edit)
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
            metadata={
                "strength": {studied.strength: chosen.value},
                **({} if masked is None else {"masks": asdict(masked)}),
            },
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


@dataclass(frozen=True)
class Masked:
    """What a mask chose at each step of a lesson.

    - `kept`: which part of the coordinates.
    - `overlap`: the Jaccard overlap with the mask of the step before, from the second step on.
    """

    kept: tuple[float, ...]
    overlap: tuple[float, ...]

    @classmethod
    def of(cls, counts: Sequence[Mapping[str, Sequence[float]]]) -> Self:
        """From the counts of `Masks` of the whole model, step by step."""
        return cls(
            tuple(step["selected"][0] / step["among"][0] for step in counts),
            tuple(step["again"][0] / step["either"][0] for step in counts[1:]),
        )


def learned(subject: Subject, lesson: Lesson) -> tuple[PreTrainedModel, Masked | None]:
    """A copy of the model after some steps of AdamW on an objective, and what a mask chose."""
    student = copy.deepcopy(subject.model)
    objective = as_objective(lesson.objective).begin(student)
    reference = None if objective.reference == "none" else FrozenModel.copied(subject.model)
    parameters = list(trainable(student).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = subject.data.draws(subject.config.sizes(("retain",)), objective.sides)
    counts: list[Mapping[str, Sequence[float]]] = []
    before: Mapping[int, torch.Tensor] = {}
    for _ in range(lesson.steps):
        optimizer.zero_grad()
        objective(SharedForward(student), next(batches), reference).backward()
        if lesson.masked:
            masks = _mask(parameters, before)
            counts.append(masks.counts())
            before = masks.kept
        optimizer.step()
        objective.advance()
    optimizer.zero_grad()
    return student, Masked.of(counts) if counts else None


def _mask(parameters: Sequence[torch.Tensor], before: Mapping[int, torch.Tensor]) -> Masks:
    """Leave of the gradients what SSU's mask keeps; the mask, beside the one before."""
    select, gradients = SaliencyMask(c=1.0), [parameter.grad for parameter in parameters]
    threshold = select.threshold(gradients, lambda index: None, torch.Generator())
    masks = Masks(Blocks.of(["model"] * len(parameters)), parameters, before)

    def chosen(i: int) -> torch.Tensor | None:
        gradient = gradients[i]
        return None if gradient is None else select.mask(gradient, None, threshold)

    mask = masks.of(chosen)
    for i, gradient in enumerate(gradients):
        kept = mask(i)
        if gradient is not None and kept is not None:
            gradient.mul_(kept)
    return masks


def _varied(
    subject: Subject, studied: StudiedEdit, edit: Edit
) -> tuple[Varied, dict[str, Any], Masked | None]:
    """The model edited at any strength, and what is told of another that it is made from."""
    model, data = subject.model, subject.data
    given: dict[str, Any] = {name: data.batches[name] for name in edit.sets}
    told: dict[str, Any] = {"before": None, "stepped": None, "overlap": None}
    if studied.lesson is None:
        return Varied.of(edit, studied.strength, model, given), told, None
    other, masked = learned(subject, studied.lesson)
    told["before"] = measure(other, data)
    if masked is not None:
        told["stepped"] = fmean(masked.kept)
        told["overlap"] = fmean(masked.overlap) if masked.overlap else None
    if not studied.swapped:
        given[studied.state] = other
        return Varied.of(edit, studied.strength, model, given), told, masked
    back = Varied.of(edit, studied.strength, other, {**given, studied.state: model})

    def change(strength: float) -> Change:
        with back.change(strength):
            return Change(model, {n: p.detach().clone() for n, p in trainable(other).items()})

    return Varied(model, change), told, masked


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
