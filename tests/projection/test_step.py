"""One step: what is skipped, what overflows, what is taken back, and what is measured."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.gradients import Gradients
from geffect.objectives import nll
from geffect.projection import (
    SAGO,
    gru,
    pcgrad,
)
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import Scaler, losses_of, placed, two_layers


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    x = torch.tensor([1.0, 2.0, -1.0])
    rectifier.backward(objective={"retain": -1.0}, retain=model(x).sum())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="retain gradient is zero"):
        rectifier.backward(objective=model(x).sum(), retain=0 * model(x).sum())
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert rectifier.skipped == 1


def test_a_rule_that_fails_in_update_space_takes_the_step_back() -> None:
    def broken(K: Tensor) -> Tensor:
        return torch.full((len(K), 2), torch.nan, dtype=K.dtype)

    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rectifier = Rectifier(model, broken, space="update", optimizer=optimizer, select=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.ones(3)
    rectifier.backward(objective={"retain": -1.0}, retain=model(x).sum())
    with pytest.raises(ValueError, match="finite weights"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"space": "update"}, {"space": "update", "scope": "coordinate"}]
)
def test_a_step_that_is_followed_tells_what_was_applied(options: dict[str, Any]) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, optimizer=optimizer, measure_update=True, ema=0.5, **options)
    for pair in tiny.pairs(3):
        optimizer.zero_grad()
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]).double()
        fresh = reference.flat(reference.gradient(model, nll(model, pair["retain"]))).double()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
        optimizer.step()
        step = before - torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
        average = torch.cat([r.reshape(-1) for r in rectifier.watched["retain_ema"]]).double()
        report = rectifier.report
        assert report is not None
        for found, r in ((report.applied_average, average), (report.applied_fresh, fresh)):
            scale = float(step.norm() * r.norm())
            assert found[0] == pytest.approx(float(step @ r), abs=1e-6 * scale)


@pytest.mark.parametrize(
    "rule", [gru, pcgrad, SAGO(prefer_retain=True)], ids=["gru", "pcgrad", "SAGO"]
)
def test_a_scaler_scales_what_is_left_and_nothing_else(rule: Any) -> None:
    grads, reports = [], []
    for scale in (1.0, 1024.0):
        model = tiny.llama()
        rectifier = Rectifier(model, rule, ema=0.5)
        for pair in tiny.pairs(2):
            model.zero_grad()
            rectifier.backward(
                scaler=Scaler(scale), objective={"forget": -1.0}, **losses_of(model, pair)
            )
        grads.append(torch.cat([p.grad.reshape(-1) / scale for p in model.parameters()]))
        reports.append(rectifier.report)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    for name in ("inner_before", "inner_after", "norm_after", "retain_norm"):
        assert getattr(reports[0], name) == pytest.approx(
            getattr(reports[1], name), rel=1e-4, abs=1e-7
        )


def test_a_scaled_step_that_overflows_is_as_if_it_had_not_been() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model)
    first, second = tiny.pairs(2)
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, first))
    average = [r.clone() for r in rectifier.watched["retain_ema"]]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rectifier.backward(
            scaler=Scaler(2.0**127), objective={"forget": -1.0}, **losses_of(model, second)
        )
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert rectifier.report is None and rectifier.skipped == 0
    assert all(map(torch.equal, average, rectifier.watched["retain_ema"]))


def test_a_retain_gradient_that_overflows_alone_lets_the_scaler_skip_the_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    rectifier = Rectifier(model)
    before = model.weight.detach().clone()
    loss = model(torch.ones(2)).sum()
    rectifier.backward(objective=-loss, retain=loss * 1e35, scaler=scaler)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() == 2.0**15
    assert rectifier.report is None


def test_an_overflow_is_told_to_the_scaler_where_the_optimizer_looks() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    rectifier = Rectifier(model, optimizer=optimizer)
    before = model[1].weight.detach().clone()
    loss = model(torch.ones(2)).sum()
    rectifier.backward(objective=-loss, retain=loss * 1e35, scaler=scaler)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(model[1].weight, before)


def test_what_was_not_scaled_is_no_overflow() -> None:
    model = nn.Linear(2, 1, bias=False)
    (weight,) = model.parameters()
    rectifier = Rectifier(model)
    weights = {"objective": {"objective": 1 / 8}, "retain": {"retain": 1.0}}
    vectors: dict[str, list[Tensor | None]] = {
        "objective": [torch.ones(1, 2)], "retain": [torch.full((1, 2), torch.inf)]
    }  # fmt: skip
    gradients = Gradients([weight], [], vectors, weights, {}, scale=8.0)
    with pytest.warns(UserWarning, match="the retain gradient is not finite"):
        rectifier.observe(gradients)
    rectifier.rectify(gradients)
    assert rectifier.skipped == 1
    assert torch.equal(weight.grad, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("space", "options"),
    [
        ("gradient", {"scope": "coordinate"}),
        ("update", {"scope": "coordinate"}),
        ("gradient", {"rule": SAGO()}),
    ],
    ids=str,
)
def test_an_objective_gradient_that_is_not_finite_is_counted_by_coordinate_too(
    space: Any, options: dict[str, Any]
) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rectifier = Rectifier(model, **placed(space, optimizer), **options)
    nn.init.zeros_(model.weight)
    x = torch.tensor([1e25, 1e25, 1.0])
    forget = (model(x) * 1e25).sum()  # zero, with a gradient that is not finite
    retain = model(torch.tensor([1.0, -1.0, 1.0])).sum()
    with pytest.warns(UserWarning, match="gradient of the objective is not finite"):
        rectifier.backward(objective=forget, retain=retain)
    assert rectifier.skipped == 1
    assert model.weight.grad.tolist() == [[torch.inf, torch.inf, pytest.approx(1e25)]]
    assert math.isnan(rectifier.report.inner_before[0])


@pytest.mark.parametrize("rule", [pcgrad, SAGO(prefer_retain=True)], ids=["pcgrad", "SAGO"])
def test_a_rule_that_adds_the_retain_gradient_adds_it_where_the_objective_has_none(
    rule: Any,
) -> None:
    model = two_layers()
    x = torch.tensor([1.0, 2.0, -1.0])
    retain = (model(x) ** 2).sum()
    (expected,) = torch.autograd.grad(retain, [model[1].weight], retain_graph=True)
    Rectifier(model, rule).backward(objective=model[0](x).sum(), retain=retain)
    torch.testing.assert_close(model[1].weight.grad, expected)
    model.zero_grad()
    Rectifier(model).backward(objective=model[0](x).sum(), retain=(model(x) ** 2).sum())
    assert model[1].weight.grad is None


@pytest.mark.parametrize("scale", [1e-30, 1e-39, 1e-42, 0.0])
def test_a_vanishing_retain_gradient_is_counted_and_changes_nothing(scale: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    rectifier = Rectifier(model)
    loss = model(torch.ones(2)).sum()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        rectifier.backward(objective=-1e3 * loss, retain=loss * scale)
    grad = model.weight.grad
    assert rectifier.skipped == 1 and torch.equal(grad, torch.full((1, 2), -1e3))


def test_a_tiny_retain_gradient_is_one_beside_a_tiny_objective_gradient() -> None:
    model = nn.Linear(2, 1, bias=False)
    rectifier = Rectifier(model)
    loss = 1e-30 * model(torch.ones(2)).sum()
    rectifier.backward(objective=-1e3 * loss, retain=loss)
    grad = model.weight.grad
    assert rectifier.skipped == 0 and grad.isfinite().all() and float(grad.norm()) <= 1e-32
