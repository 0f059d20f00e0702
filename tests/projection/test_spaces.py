"""Spaces: what holds for the gradient, and what for the step of an optimizer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.objectives import nll
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import OPTIMIZERS, cosines, losses_of, placed, run, two_layers
from tests.utils.vectors import rectified, tensors


class Quadratic(nn.Module):
    """Two parameters, risks that are quadratics with different minima."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def risk(self, centre: float) -> Tensor:
        return ((self.a - centre) ** 2).sum() + 2 * ((self.b + centre) ** 2).sum()


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("scope", ["model", "layer", "coordinate"])
def test_a_rectified_step_does_not_raise_the_retain_risk(space: Any, scope: Any) -> None:
    # The sign test: GA's gradient is minus that of the forget risk, and must be rectified as such.
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rectifier = Rectifier(model, scope=scope, **placed(space, optimizer))
    before = model.risk(0.1).item(), model.risk(0.3).item()
    rectifier.backward(objective={"forget": -1.0}, forget=model.risk(0.1), retain=model.risk(0.3))
    optimizer.step()
    fall = before[1] - model.risk(0.3).item()
    # To first order nothing changes; what is left is the curvature of the step.
    assert fall >= -1e-6 * before[1]
    plain = Quadratic()
    step = torch.optim.SGD(plain.parameters(), lr=1e-4)
    (-plain.risk(0.1)).backward()
    step.step()
    assert before[1] - plain.risk(0.3).item() < -1e-4 * before[1], "the test has no conflict"


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *[(name, scope) for name in OPTIMIZERS for scope in ("model", "coordinate")],
        ("adamw", "layer"),  # which reads the step as `model` does
        ("sgd-momentum", "layer"),
    ],
)
def test_in_update_space_no_applied_step_opposes_the_average(name: str, scope: str) -> None:
    seen = run({"space": "update", "scope": scope}, OPTIMIZERS[name], steps=5)
    assert min(cosines(seen)) >= -1e-6
    if scope == "coordinate":
        for step, average in seen:
            assert (step * average >= 0).all()


def test_in_gradient_space_adamw_breaks_the_constraint() -> None:
    assert min(cosines(run({}))) < -1e-3
    assert min(cosines(run({"rule": None}))) < -1e-3


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_the_counterexample_of_a_preconditioner(space: Any) -> None:
    # r = (1, 1), u = (-3, 1), second moments (1, 100): the step along the rectified gradient harms.
    u, r = tensors([-3.0, 1.0], [1.0, 1.0])
    torch.testing.assert_close(rectified(u, r), torch.tensor([-2.0, 2.0]).double())
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    optimizer.state[model.weight] = {
        "step": torch.tensor(1e9),
        "exp_avg": torch.zeros(1, 2).double(),
        "exp_avg_sq": torch.tensor([[1.0, 1e4]]).double(),
    }
    # A second moment that stays as it is: no step corrects it for a start at zero.
    optimizer.param_groups[0]["betas"] = (0.0, 0.999999999999)
    rectifier = Rectifier(model, **placed(space, optimizer))
    before = model.weight.detach().clone()
    rectifier.backward(objective=model(u).sum(), retain=model(r).sum())
    optimizer.step()
    applied = (before - model.weight.detach()).flatten()
    if space == "gradient":
        assert torch.dot(applied, r) < -0.1 * applied.norm()
    else:
        assert torch.dot(applied, r) >= -1e-9 * applied.norm()


def test_update_space_leaves_alone_what_the_optimizer_does_not_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    first, second = model
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    kept = [p.detach().clone() for p in second.parameters()]
    x = torch.ones(3)
    rectifier.backward(objective={"retain": -1.0}, retain=model(x).sum())
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(second.parameters(), kept, strict=True))
    report = rectifier.report
    assert report is not None and report.fired == (1.0,)
    own = sum(float((p.grad.double() ** 2).sum()) for p in first.parameters())
    assert report.retain_norm[0] == pytest.approx(own**0.5, rel=1e-6)


def test_the_report_measures_what_half_precision_leaves() -> None:
    model = tiny.llama().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    pair = tiny.pairs(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    losses = {side: nll(model, batch) for side, batch in pair.items()}
    rectifier.backward(objective={"forget": -1.0}, **losses)
    optimizer.step()
    average = rectifier.watched["retain_ema"]
    measured = sum(
        float(((old.double() - p.detach().double()) * r.double()).sum())
        for old, p, r in zip(before, model.parameters(), average, strict=True)
    )
    assert rectifier.report is not None
    assert rectifier.report.inner_after[0] == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert measured >= 0 and rectifier.report.fired == (1.0,)


def test_the_correction_along_the_scaled_retain_gradient() -> None:
    model = tiny.llama()
    plain_model = copy.deepcopy(model)
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain_model))
    rectifier = Rectifier(
        model, space="update", correction="retain_adam", optimizer=optimizer, ema=1.0
    )
    pair = tiny.pairs(1)[0]
    before = reference.flat({n: p.detach().clone() for n, p in model.named_parameters()}).double()
    r = reference.flat(reference.gradient(model, nll(model, pair["retain"]))).double()
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    optimizer.step()
    (-nll(plain_model, pair["forget"])).backward()
    plain.step()
    x, u = (
        before - reference.flat({n: p.detach() for n, p in m.named_parameters()}).double()
        for m in (model, plain_model)
    )
    q = r / (r.abs() + 1e-8)  # after one step the mean square is the square
    expected = u + max(0.0, -float(u @ r) / float(q @ r)) * q
    assert float(u @ r) < 0
    assert (x - expected).norm() <= 1e-3 * u.norm()
    assert float(x @ r) >= -1e-6 * float(x.norm() * r.norm())
    assert rectifier.report is not None
    assert rectifier.report.norm_after[0] == pytest.approx(float(x.norm()), rel=1e-3)
    assert abs(rectifier.report.inner_after[0]) <= 1e-9 * float(u.norm() * r.norm())


def test_what_the_optimizer_does_not_step_takes_no_part() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-3)
    rectifier = Rectifier(model, optimizer=optimizer, ema=1.0)
    x = torch.tensor([1.0, 2.0, -1.0])
    fired = 0.0
    for step in range(4):
        optimizer.zero_grad()
        before = torch.cat([p.detach().flatten().clone() for p in model[1].parameters()])
        other = x + torch.tensor([step, -1.0, 0.5])
        rectifier.backward(objective=-model(x).sum(), retain=((model(other) + 9) ** 2).sum())
        optimizer.step()
        applied = before - torch.cat([p.detach().flatten() for p in model[1].parameters()])
        r = torch.cat([t.flatten() for t in rectifier.watched["retain_ema"][2:]])
        assert torch.dot(applied, r) >= -1e-4 * applied.norm() * r.norm()
        fired += rectifier.report.fired[0]
    assert fired > 0


@pytest.mark.parametrize(
    "options", [{}, {"space": "update"}, {"space": "update", "scope": "coordinate"}], ids=str
)
def test_a_parameter_without_gradient_is_not_decayed(options: dict[str, Any]) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    rectifier = Rectifier(model, optimizer=optimizer, **options)
    before = model[1].weight.detach().clone()
    x = torch.tensor([1.0, 2.0, -1.0])
    rectifier.backward(objective=-model[0](x).sum(), retain=(model(x) ** 2).sum())
    optimizer.step()
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.grad is None


@pytest.mark.parametrize("scope", ["model", "coordinate"])
def test_what_is_done_to_gradients_before_the_step_is_seen(scope: Any) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rectifier = Rectifier(model, space="update", scope=scope, optimizer=optimizer)

    def clip(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    optimizer.register_step_pre_hook(clip)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    x = torch.tensor([1.0, 2.0, -1.0])
    rectifier.backward(objective=-model(x).sum(), retain=(model(2 * x) ** 2).sum())
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) <= 2e-6
