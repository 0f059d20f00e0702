"""An edit of the study: as strong as equal forgetting takes, measured and recorded."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from geffect import open_run
from geffect.analysis import edited as effects
from geffect.demo import editing
from geffect.demo import language_model as lm
from geffect.demo.data import Data
from geffect.demo.editing import Subject, edited, learned
from geffect.demo.edits import DISRUPTION, EDITS, Lesson
from geffect.demo.measures import measure
from geffect.edits import TaskVectorNegation
from geffect.layers import trainable
from geffect.objectives import SSUAcquire
from tests.utils.subject import TINY

LEVEL = 1.0


@pytest.fixture(scope="module")
def asked(subject: tuple[PreTrainedModel, Data]) -> Subject:
    return Subject(*subject, TINY.unlearning)


def divergence(model: nn.Module, before: nn.Module, data: Data) -> float:
    """KL(p_before || p), token by token of the answers."""
    terms = []
    with torch.no_grad():
        for batch in data.batches["retain"]:
            now, then = (
                m(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
                for m in (model, before)
            )
            scored = batch["labels"][:, 1:] != -100
            terms += (then.exp() * (then - now)).sum(-1)[scored].tolist()
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name", ["negation", "mix"])
def test_an_edit_at_equal_forgetting_and_at_equal_disruption(
    name: str, asked: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studied = replace(EDITS[name], lesson=replace(EDITS[name].lesson or Lesson("ga", 1), steps=12))
    monkeypatch.setattr(editing, "LEARNING_RATE", 2e-3)  # of a model as small as this one
    before = {n: p.clone() for n, p in asked.model.state_dict().items()}
    result = edited(asked, studied, LEVEL, tmp_path / "run.h5")
    assert all(torch.equal(p, before[n]) for n, p in asked.model.state_dict().items())
    json.dumps(result, allow_nan=False)
    at = result["at_level"]
    assert result["reached_level"] and at["forget_nll"] == pytest.approx(LEVEL, rel=2e-3)
    # The naive twin: theta + strength D, made by hand.
    other, _ = learned(asked, studied.lesson or Lesson("ga", 1))
    sign = 1.0 if name == "mix" else -1.0
    own, theirs = trainable(asked.model), trainable(other)
    for part, kl in (("at_level", None), ("at_disruption", DISRUPTION)):
        strength = result[part]["strength"]
        model = copy.deepcopy(asked.model)
        with torch.no_grad():
            for n, p in trainable(model).items():
                p += sign * strength * (theirs[n] - own[n])
        for key, value in measure(model, asked.data).items():
            assert result[part][key] == pytest.approx(value, rel=1e-2, abs=1e-4)
        if kl is not None:
            assert divergence(model, asked.model, asked.data) == pytest.approx(kl, rel=1e-2)
    assert result["before"] == measure(other, asked.data)
    run = open_run(tmp_path / "run.h5")
    table = effects(run, by="model").set_index("risk")
    fallen = lm.nll(asked.model, asked.data.batches["forget"]) - at["forget_nll"]
    assert table.loc["forget", "measured"] == pytest.approx(fallen, rel=1e-3)
    predicted = table.loc["forget", "predicted"]
    assert result["g_effects"]["of_updates_forget"] == pytest.approx(predicted)
    assert result["curve"]["forget_nll"][-1] == pytest.approx(at["forget_nll"], rel=1e-5)
    assert result["highest_forget_nll"] >= LEVEL


def test_what_is_not_reached_is_said(asked: Subject, tmp_path: Path) -> None:
    studied = replace(EDITS["repselect"], between=(1e-3, 2e-3), options={"k": 2})
    result = edited(asked, studied, LEVEL, tmp_path / "run.h5")
    assert not result["reached_level"]
    assert result["at_level"] is result["at_disruption"] is result["g_effects"] is None
    assert 0 < result["highest_forget_nll"] < LEVEL
    assert not (tmp_path / "run.h5").exists()
    json.dumps(result, allow_nan=False)


def test_a_lesson_is_a_loop_of_adamw(asked: Subject) -> None:
    student, stepped = learned(asked, Lesson({"forget": 1.0}, 3))
    assert stepped is None
    twin = copy.deepcopy(asked.model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-4, weight_decay=0.0)
    batches = asked.data.draws({"forget": 5, "retain": 5})
    for _ in range(3):
        batch: Any = next(batches)["forget"]
        logits = twin(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_a_masked_lesson_moves_what_has_a_large_gradient(asked: Subject) -> None:
    (whole, _), (masked, found) = (
        learned(asked, Lesson("ssu-acquire", 1, masked=masked)) for masked in (False, True)
    )
    assert found is not None and found.overlap == ()
    original = [*asked.model.parameters()]
    moved = [
        [(p != o) for p, o in zip(model.parameters(), original, strict=True)]
        for model in (whole, masked)
    ]
    counts = [sum(int(own.sum()) for own in of) for of in moved]
    assert 0 < counts[1] < 0.3 * counts[0]
    # A step of AdamW moves what has a gradient, but for what is less than a number's rounding.
    total = sum(p.numel() for p in original)
    assert found.kept[0] == pytest.approx(counts[1] / total, rel=0.02)
    assert all((few <= many).all() for many, few in zip(*moved, strict=True))


def test_the_masks_of_ssu_are_told_step_by_step(asked: Subject, tmp_path: Path) -> None:
    studied = replace(EDITS["negation-ssu"], lesson=Lesson("ssu-acquire", 3, masked=True))
    result = edited(asked, studied, 1e-3, tmp_path / "run.h5")
    # The naive twin: the same lesson, with each mask by hand.
    twin, masks = copy.deepcopy(asked.model), []
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-4, weight_decay=0.0)
    objective = SSUAcquire()
    batches = asked.data.draws(asked.config.sizes(("retain",)), objective.sides)
    for _ in range(3):
        optimizer.zero_grad()
        objective(twin, next(batches)).backward()
        u = torch.cat([p.grad.flatten() for p in twin.parameters()]).double().abs()
        bound = u.mean() + u.std(correction=0)
        masks.append(u >= bound)
        for p in twin.parameters():
            p.grad *= p.grad.abs() >= bound
        optimizer.step()
    kept = [float(mask.double().mean()) for mask in masks]
    overlap = [float((a & b).sum() / (a | b).sum()) for a, b in pairwise(masks)]
    told = open_run(tmp_path / "run.h5").metadata["masks"]
    assert told["kept"] == pytest.approx(kept, rel=0.02)
    assert told["overlap"] == pytest.approx(overlap, rel=0.05)
    assert result["stepped"] == pytest.approx(sum(told["kept"]) / 3)
    assert result["overlap"] == pytest.approx(sum(told["overlap"]) / 2)


@pytest.mark.parametrize("basis", ["forget", "retain"])
def test_repselect_at_equal_disruption(basis: str, asked: Subject, tmp_path: Path) -> None:
    """As its paper compares: as long a step along its direction as the KL budget takes."""
    name = "repselect" if basis == "forget" else "repselect-retain"
    strength = "soft" if basis == "forget" else "hard"
    studied = replace(EDITS[name], options={"k": 2, "basis": basis, "strength": strength})
    result = edited(asked, studied, LEVEL, tmp_path / "run.h5")
    at = result["at_disruption"]
    # The naive twin: every MLP matrix of the gradient of all batches, by its SVD.
    mlp = {n: p for n, p in asked.model.named_parameters() if "mlp" in n and p.ndim == 2}
    mean = {}
    for side in ("forget", "retain"):
        own = [naive_gradient(asked.model, [*mlp.values()], b) for b in asked.data.batches[side]]
        mean[side] = [torch.stack(of).mean(dim=0) for of in zip(*own, strict=True)]
    moved = {}
    for n, g, b in zip(mlp, mean["forget"], mean[basis], strict=True):
        U, S, Vh = torch.linalg.svd(b, full_matrices=False)
        gone = torch.ones(2) if strength == "hard" else 1 - S[1] / S[:2]
        x = g - g @ Vh[:2].T @ torch.diag(gone.double()) @ Vh[:2]
        moved[n] = x - U[:, :2] @ torch.diag(gone.double()) @ U[:, :2].T @ x
    length = torch.stack([x.square().sum() for x in moved.values()]).sum().sqrt()
    model = copy.deepcopy(asked.model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in moved:
                p += at["strength"] * moved[n] / length
    assert divergence(model, asked.model, asked.data) == pytest.approx(DISRUPTION, rel=1e-2)
    for key, value in measure(model, asked.data).items():
        assert at[key] == pytest.approx(value, rel=1e-2, abs=1e-4)
    # The least such step: a shorter one disrupts less.
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in moved:
                p -= 0.1 * at["strength"] * moved[n] / length
    assert divergence(model, asked.model, asked.data) < DISRUPTION


def naive_gradient(model: nn.Module, parameters: list[Any], batch: Any) -> list[torch.Tensor]:
    """Of the mean NLL of the scored tokens, in float64."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    return [g.double() for g in torch.autograd.grad(loss, parameters)]


def test_negation_of_what_was_learned_is_that_of_the_catalogue(asked: Subject) -> None:
    other, _ = learned(asked, Lesson({"forget": 1.0}, 2))
    expected = TaskVectorNegation(alpha=3.0).displacement(asked.model, {"tuned": other})
    own, theirs = trainable(asked.model), trainable(other)
    for name, moved in expected.items():
        torch.testing.assert_close(moved, -3.0 * (theirs[name] - own[name]), rtol=1e-3, atol=1e-7)
    assert math.isfinite(lm.nll(other, asked.data.batches["forget"]))
