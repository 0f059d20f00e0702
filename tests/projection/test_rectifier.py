"""Rectification: what GRU is, and what it promises in both spaces and every scope."""

import copy
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geffect import Rectifier
from geffect.gradients import Gradients, reduced
from geffect.objectives import nll
from geffect.projection import (
    SAGO,
    State,
    a_gem,
    blur,
    gru,
    nearest,
    off_span,
    orthogonal,
    pcgrad,
)
from tests.utils import reference, tiny
from tests.utils.vectors import rectified, tensors


def placed(space: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The arguments that put a rectifier into a space."""
    return {"space": space, **({"optimizer": optimizer} if space == "update" else {})}


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


def run(
    rectifier_options: dict[str, Any],
    optimizer_of: Any = lambda p: torch.optim.AdamW(p, lr=1e-3),
    steps: int = 8,
) -> list[tuple[Tensor, Tensor]]:
    """(applied step, retain average) of every step of GA on a tiny Llama, flat."""
    model = tiny.llama()
    optimizer = optimizer_of(model.parameters())
    stepped = placed(rectifier_options.pop("space", "gradient"), optimizer)
    rectifier = Rectifier(model, ema=0.3, **stepped, **rectifier_options)
    seen = []
    for pair in tiny.pairs(steps):
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        optimizer.zero_grad()
        rectifier.backward(
            objective={"forget": -1.0},
            forget=nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
        )
        optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        average = rectifier.watched["retain_ema"]
        seen.append((before - after, torch.cat([r.reshape(-1).clone() for r in average])))
    rectifier.detach()
    return seen


def cosines(seen: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [
        float(torch.dot(a.double(), b.double()) / a.double().norm() / b.double().norm())
        for a, b in seen
    ]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["model", "layer", "coordinate"])
def test_in_update_space_no_applied_step_opposes_the_average(name: str, scope: str) -> None:
    seen = run({"space": "update", "scope": scope}, OPTIMIZERS[name])
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


def test_the_default_is_gru_on_the_whole_model_with_the_average() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, ema=0.8)
    average = None
    for pair in tiny.pairs(3):
        u = -reference.flat(reference.gradient(model, nll(model, pair["forget"])))
        r = reference.flat(reference.gradient(model, nll(model, pair["retain"])))
        average = r if average is None else 0.8 * r + 0.2 * average
        model.zero_grad()
        rectifier.backward(
            objective={"forget": -1.0},
            forget=nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
        )
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        expected = reference.gru(u.double(), average.double()).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(u.norm()))


def test_the_report_says_what_was_done() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, ema=1.0)
    pair = {"forget": tiny.batch(0), "retain": tiny.batch(0)}  # opposite: everything is removed
    losses = {side: nll(model, batch) for side, batch in pair.items()}
    rectifier.backward(objective={"forget": -2.0}, **losses)
    report = rectifier.report
    assert report is not None
    assert report.fired == (1.0,)
    assert report.coefficient[0] == pytest.approx(2.0, rel=1e-5)
    assert report.norm_before[0] == pytest.approx(2 * report.retain_norm[0], rel=1e-5)
    assert report.inner_before[0] == pytest.approx(-2 * report.retain_norm[0] ** 2, rel=1e-5)
    assert report.norm_after[0] <= 1e-5 * report.norm_before[0]
    assert abs(report.inner_after[0]) <= 1e-10 * report.norm_before[0] ** 2


def test_layers_have_a_constraint_each() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, scope="layer", ema=1.0)
    pair = tiny.pairs(1)[0]
    rectifier.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
    )
    report = rectifier.report
    assert report is not None
    assert report.blocks == rectifier.blocks and len(report.blocks) == 7
    retain = reference.gradient(model, nll(model, pair["retain"]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    by_layer = {
        layer: [n for n in retain if f".{i}." in n]
        for i, layer in enumerate(f"layer {i}" for i in range(4))
    }
    grads = {n: p.grad for n, p in model.named_parameters()}
    for layer, names in by_layer.items():
        along = sum(reference.inner(grads, retain, n) for n in names)
        place = report.blocks.index(layer)
        scale = report.norm_before[place] * report.retain_norm[place]
        assert along >= -1e-6 * scale
        assert along == pytest.approx(report.inner_after[place], abs=1e-6 * scale)


def test_one_layer_makes_layer_scope_model_scope() -> None:
    results = []
    for scope in ("model", "layer"):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        rectifier = Rectifier(model, scope=scope)  # type: ignore[arg-type]
        x = torch.tensor([1.0, -2.0, 3.0])
        rectifier.backward(objective=-model(x).sum(), retain=(model(x + 1) ** 2).sum())
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)


def test_stopped_coordinates_have_their_old_value_bit_for_bit() -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plain_model = copy.deepcopy(model)
    plain = torch.optim.AdamW(plain_model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, scope="coordinate", space="update", optimizer=optimizer)
    pair = tiny.pairs(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    rectifier.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
    )
    optimizer.step()
    (-nll(plain_model, pair["forget"])).backward()
    plain.step()
    average = rectifier.watched["retain_ema"]
    moved = 0
    for old, new, free, r in zip(
        before, model.parameters(), plain_model.parameters(), average, strict=True
    ):
        against = (old - free) * r < 0
        assert torch.equal(new[against], old[against])
        assert torch.equal(new[~against], free[~against])
        moved += int((new != old).sum())
    assert moved > 0


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_selective_steps_keep_the_most_salient_coordinates(space: Any) -> None:
    fraction = 0.05
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rectifier = Rectifier(model, None, select=fraction, **placed(space, optimizer))
    pair = tiny.pairs(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    u = reference.flat(reference.gradient(model, nll(model, pair["forget"])))
    r = reference.flat(reference.gradient(model, nll(model, pair["retain"])))
    rectifier.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
    )
    optimizer.step()
    moved = torch.cat(
        [(p.detach() != old).reshape(-1) for p, old in zip(model.parameters(), before, strict=True)]
    )
    # After one step the second moment is the square of the only retain gradient.
    ratio = u.abs() / (r.abs() + 1e-8)
    wanted = ratio >= torch.quantile(ratio, 1 - fraction)
    assert moved.float().mean() == pytest.approx(fraction, rel=0.1)
    assert (moved & ~wanted).sum() <= 0.02 * wanted.sum()


def test_a_selective_step_is_projected_within_its_coordinates() -> None:
    seen = run({"space": "update", "select": 0.1})
    assert min(cosines(seen)) >= -1e-6
    for step, _ in seen[1:]:
        assert (step != 0).float().mean() < 0.15


def test_the_average_weighs_the_new_gradient_and_owns_its_memory() -> None:
    model = nn.Linear(2, 1, bias=False)
    rectifier = Rectifier(model, ema=0.25)
    seen = []
    for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        model.zero_grad()
        inputs = torch.tensor(x)
        rectifier.backward(objective=-model(inputs).sum(), retain=model(inputs).sum())
        model.weight.grad.zero_()  # what happens to `.grad` later does not reach the average
        seen.append(rectifier.watched["retain_ema"][0].reshape(-1).tolist())
    assert seen == [[1.0, 0.0], [0.75, 0.25], [0.8125, 0.4375]]


def test_the_average_stays_exact_over_many_steps() -> None:
    model = nn.Linear(50, 1, bias=False).bfloat16()
    rectifier = Rectifier(model, None, ema=0.01)
    draw = torch.Generator().manual_seed(0)
    expected = None
    for _ in range(400):
        x = torch.randn(50, generator=draw).bfloat16()
        model.zero_grad()
        rectifier.backward(objective=model(x).sum(), retain=model(x).sum())
        exact = x.double()
        expected = exact if expected is None else 0.01 * exact + 0.99 * expected
    (found,) = rectifier.watched["retain_ema"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.reshape(-1).double(), expected, rtol=1e-5, atol=1e-6)


def test_detached_it_leaves_the_optimizer_alone() -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rectifier = Rectifier(model, scope="coordinate", space="update", optimizer=optimizer)
    pair = tiny.pairs(1)[0]
    rectifier.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
    )
    rectifier.detach()
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_rectifier_that_only_watches_changes_nothing() -> None:
    pair = tiny.pairs(1)[0]
    results = []
    for watched in (True, False):
        model = tiny.llama()
        losses = {side: nll(model, batch) for side, batch in pair.items()}
        if watched:
            Rectifier(model, None).backward(objective={"forget": -1.0}, **losses)
        else:
            (-losses["forget"]).backward()
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)


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
    with pytest.warns(UserWarning, match=r"below the rounding of the parameters. Keep them in fl"):
        optimizer.step()
    average = rectifier.watched["retain_ema"]
    measured = sum(
        float(((old.double() - p.detach().double()) * r.double()).sum())
        for old, p, r in zip(before, model.parameters(), average, strict=True)
    )
    assert rectifier.report is not None
    assert rectifier.report.inner_after[0] == pytest.approx(measured, rel=1e-6, abs=1e-12)


def always(K: Tensor) -> Tensor:
    """The orthogonal rule, unguarded."""
    along = -K[..., 0, 1] / K[..., 1, 1]
    return torch.stack([torch.ones_like(along), along], dim=-1)


def test_a_rule_is_not_asked_about_a_block_without_retain_gradient() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])})
    first, second = model["layers"]  # type: ignore[misc]
    rectifier = Rectifier(model, always, scope="layer")
    x = torch.tensor([1.0, 2.0])
    rectifier.backward(objective=first(x).sum() + second(x).sum(), retain=first(-x).sum())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(second.weight.grad, x[None])
    assert rectifier.report is not None and rectifier.report.fired == (1.0, 0.0)


def test_a_rule_without_finite_weights_is_refused_and_changes_nothing() -> None:
    def broken(K: Tensor) -> Tensor:
        return torch.full((len(K), 2), torch.nan, dtype=K.dtype)

    model = nn.Linear(2, 1)
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"should give finite weights. Found .*broken.* Guard"):
        Rectifier(model, broken).backward(objective=model(x).sum(), retain=model(-x).sum())
    assert torch.equal(model.weight.grad, x[None])


def test_misuse_is_said_in_one_sentence() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(3, 1)
    loss = model(torch.ones(2)).sum()
    with pytest.raises(ValueError, match=r'before a step with space="update".* Found none. Pass'):
        Rectifier(model, space="update").backward(objective=-loss, retain=loss)
    with pytest.raises(ValueError, match=r"one named `objective`. Found retain. Pass objective"):
        Rectifier(model).backward(retain=loss)
    from geffect.gradients import differentiate

    gradients = differentiate(list(model.parameters()), {"retain": loss})
    with pytest.raises(ValueError, match=r"made for the model that is trained. Found .* Make it"):
        Rectifier(other).observe(gradients)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("options", [{"rule": None}, {}, {"scope": "coordinate"}], ids=str)
def test_selection_is_among_what_the_optimizer_steps(options: dict[str, Any]) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    rectifier = Rectifier(model, space="update", optimizer=optimizer, select=0.5, **options)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.tensor([1.0, 2.0, -1.0])
    rectifier.backward(objective=-model(x).sum(), retain=(model(2 * x) ** 2).sum())
    optimizer.step()
    moved = [int((p != old).sum()) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved[:2] == [0, 0]
    assert sum(moved) <= 2, "half of the four that the optimizer steps"


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


def test_a_rectifier_of_a_copy_is_not_that_of_the_model() -> None:
    model = two_layers()
    rectifier = Rectifier(copy.deepcopy(model))
    from geffect.gradients import differentiate

    loss = model(torch.ones(3)).sum()
    with pytest.raises(ValueError, match="made for the model that is trained"):
        rectifier.observe(differentiate(list(model.parameters()), {"retain": loss}))


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


def losses_of(model: nn.Module, pair: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {side: nll(model, batch) for side, batch in pair.items()}


@pytest.mark.parametrize("options", [{"scope": "coordinate"}, {"rule": None, "select": 0.05}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_portions_is_the_step_of_the_whole(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Following a step needs all of the old parameters, so that it is taken in one.
    monkeypatch.setattr("geffect.projection.portions.PORTION_BYTES", 2000)
    results = []
    for measured in (False, True):
        model = tiny.llama()
        optimizer = OPTIMIZERS[name](model.parameters())
        rectifier = Rectifier(
            model, space="update", optimizer=optimizer, measure_update=measured, **options
        )
        for pair in tiny.pairs(3):
            optimizer.zero_grad()
            rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
            grads = [p.grad for p in model.parameters()]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        results.append([*model.parameters(), *[v for v in state if isinstance(v, Tensor)]])
        rectifier.detach()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_in_portions_that_raises_leaves_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, space="update", scope="coordinate", optimizer=optimizer)
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, tiny.pairs(1)[0]))

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    rectifier.detach()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("scope", ["group", "layer", "parameter"])
def test_every_block_of_a_scope_keeps_its_constraint(scope: Any) -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, scope=scope)
    pair = tiny.pairs(1)[0]
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    retain = reference.gradient(model, nll(model, pair["retain"]))
    from geffect.layers import describe

    labels = {
        p.name: p.name if scope == "parameter" else getattr(p, scope) for p in describe(model)
    }
    along: dict[str, float] = dict.fromkeys(rectifier.blocks, 0.0)
    for name, parameter in model.named_parameters():
        along[labels[name]] += float((parameter.grad.double() * retain[name].double()).sum())
    report = rectifier.report
    assert report is not None and set(report.fired) <= {0.0, 1.0} and 1.0 in report.fired
    for block, u, r, after in zip(
        report.blocks, report.norm_before, report.retain_norm, report.inner_after, strict=True
    ):
        assert along[block] >= -1e-6 * u * r
        assert along[block] == pytest.approx(after, abs=1e-6 * u * r)


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_nearest_harms_none_of_several_retain_sets(space: Any) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, nearest, protect=("retain", "world"), **placed(space, optimizer))
    assert list(rectifier.watched) == ["retain_ema", "world_ema"]
    fired = 0.0
    for step, pair in enumerate(tiny.pairs(4)):
        optimizer.zero_grad()
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        rectifier.backward(
            objective={"forget": -1.0},
            world=nll(model, tiny.batch(100 + step)),
            **losses_of(model, pair),
        )
        x = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        optimizer.step()
        if space == "update":
            x = before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        report = rectifier.report
        assert report is not None and report.blocks == ("model, retain", "model, world")
        fired += sum(report.fired)
        for place, average in enumerate(rectifier.watched.values()):
            r = torch.cat([tensor.reshape(-1) for tensor in average])
            along = float(torch.dot(x.double(), r.double()))
            scale = float(x.double().norm() * r.double().norm())
            assert along >= -1e-6 * scale
            assert report.inner_after[place] == pytest.approx(along, abs=2e-6 * scale)
    assert fired > 0


def test_a_rule_for_one_retain_gradient_refuses_several() -> None:
    for rule in (gru, a_gem, orthogonal, pcgrad, blur, SAGO()):
        with pytest.raises(ValueError, match=r"should be given one retain gradient .* Take|Add"):
            Rectifier(nn.Linear(2, 1), rule, protect=("retain", "world"))
    for rule in (nearest, off_span):
        Rectifier(nn.Linear(2, 1), rule, protect=("retain", "world"))


def test_the_forget_part_is_rectified_and_the_retain_term_added_behind() -> None:
    for part in ("total", "forget"):
        model = tiny.llama()
        rectifier = Rectifier(model, part=part, ema=1.0)  # type: ignore[arg-type]
        pair = tiny.pairs(1)[0]
        u = -reference.flat(reference.gradient(model, nll(model, pair["forget"]))).double()
        r = reference.flat(reference.gradient(model, nll(model, pair["retain"]))).double()
        rectifier.backward(objective={"forget": -1.0, "retain": 0.25}, **losses_of(model, pair))
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()
        whole = reference.gru(u + 0.25 * r, r)
        behind = reference.gru(u, r) + 0.25 * r
        expected = whole if part == "total" else behind
        assert (whole - behind).norm() > 1e-3 * u.norm(), "the parts differ"
        assert (found - expected).norm() <= 1e-5 * u.norm()
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                rectifier.watched["retain_ema"], reference_tensors(model, pair), strict=True
            )
        )


def test_a_rule_that_adds_the_retain_gradient_gets_it_once() -> None:
    model = tiny.llama()
    pair = tiny.pairs(1)[0]
    u = -reference.flat(reference.gradient(model, nll(model, pair["forget"])))
    r = reference.flat(reference.gradient(model, nll(model, pair["retain"])))
    rectifier = Rectifier(model, SAGO(prefer_retain=True), part="forget", ema=1.0)
    rectifier.backward(objective={"forget": -1.0, "retain": 1.0}, **losses_of(model, pair))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = torch.where(u * r < 0, r, u + r)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def reference_tensors(model: nn.Module, pair: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return list(reference.gradient(model, nll(model, pair["retain"])).values())


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


def test_micro_batches_are_rectified_as_the_whole() -> None:
    results = []
    for windows in (1, 3):
        model = tiny.llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        rectifier = Rectifier(model)
        pairs = tiny.pairs(6)
        for start in (0, 3):
            optimizer.zero_grad()
            window = pairs[start : start + 3]
            if windows == 1:
                sums = {
                    side: sum(nll(model, pair[side]) for pair in window) / 3  # type: ignore[misc]
                    for side in ("forget", "retain")
                }
                rectifier.backward(objective={"forget": -1.0}, **sums)
            else:
                for place, pair in enumerate(window):
                    parts = {side: nll(model, batch) / 3 for side, batch in pair.items()}
                    rectifier.backward(objective={"forget": -1.0}, accumulate=place < 2, **parts)
                    assert (model.model.norm.weight.grad is None) == (place < 2)
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


class Scaler:
    """A GradScaler whose scale is what is said, on a device that has none."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scale(self, loss: Tensor) -> Tensor:
        return self.factor * loss

    def is_enabled(self) -> bool:
        return True


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": None, "select": 0.05, "space": "update"},
        {"scope": "coordinate", "space": "update", "state": State(torch.bfloat16)},
        {"space": "update", "correction": "retain_adam", "state": State(device="cpu")},
    ],
    ids=str,
)
def test_a_run_that_was_stopped_and_resumed_equals_the_one_that_was_not(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def made(model: nn.Module) -> tuple[torch.optim.Optimizer, Rectifier]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return optimizer, Rectifier(
            model, **options, **({"optimizer": optimizer} if options else {})
        )

    def train(model: nn.Module, optimizer: Any, rectifier: Rectifier, pairs: Any) -> None:
        for pair in pairs:
            optimizer.zero_grad()
            rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
            optimizer.step()

    pairs = tiny.pairs(6)
    whole = tiny.llama()
    train(whole, *made(whole), pairs)
    stopped = tiny.llama()
    optimizer, rectifier = made(stopped)
    train(stopped, optimizer, rectifier, pairs[:3])
    states = stopped.state_dict(), optimizer.state_dict(), rectifier.state_dict()
    torch.save(states, tmp_path / "checkpoint.pt")
    resumed = tiny.llama(seed=1)
    optimizer, rectifier = made(resumed)
    for owner, state in zip(
        (resumed, optimizer, rectifier), torch.load(tmp_path / "checkpoint.pt"), strict=True
    ):
        owner.load_state_dict(state)
    train(resumed, optimizer, rectifier, pairs[3:])
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_the_two_gradients_of_a_step_are_not_in_memory_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[list[weakref.ref[Tensor]]] = []

    def watching(*args: Any) -> Any:
        assert all(tensor() is None for tensor in (taken[-1] if len(taken) % 2 else []))
        gradients = reduced(*args)
        vectors = gradients.vectors.values()
        taken.append([weakref.ref(t) for v in vectors for t in v if t is not None])
        return gradients

    monkeypatch.setattr("geffect.projection.rectifier.reduced", watching)
    model = tiny.llama()
    rectifier = Rectifier(model, ema=0.5)
    for pair in tiny.pairs(2):
        model.zero_grad()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    assert [len(tensors) > 0 for tensors in taken] == [True] * 4, "a retain pass, then another"


def test_rules_that_look_at_lengths_are_refused_in_update_space() -> None:
    model = nn.Linear(2, 1)
    for rule in (pcgrad, blur, SAGO()):
        with pytest.raises(ValueError, match=r"of any length.* Found .* Pass space"):
            Rectifier(model, rule, space="update")
        Rectifier(model, rule)
    for rule in (gru, orthogonal, a_gem, off_span, nearest):
        Rectifier(model, rule, space="update")


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


def test_nearly_parallel_retain_sets_are_told_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    r, apart, u = (torch.randn(200_000, generator=draw) ** 3 for _ in range(3))
    s, u = r + 1e-4 * apart, u - apart
    model = nn.Linear(200_000, 1, bias=False)
    rectifier = Rectifier(model, off_span, protect=("retain", "world"))
    sides = {"objective": u, "retain": r, "world": s}
    rectifier.backward(**{name: (model.weight * side).sum() for name, side in sides.items()})
    # What is left without its part in a span is that of the objective in the rest.
    q, _ = torch.linalg.qr(torch.stack([r, apart], dim=1).double())
    rest = u.double() - q @ (q.T @ u.double())
    x = model.weight.grad.flatten().double()
    assert abs(x.norm() / rest.norm() - 1) < 1e-3


class Embedded(nn.Module):
    """A frozen embedding whose output requires a gradient, as for checkpoints, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4).requires_grad_(False)
        self.head = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).requires_grad_()
        return nn.functional.cross_entropy(self.head(hidden), ids)


def test_micro_batches_may_have_leaves_of_their_own() -> None:
    grads = []
    windows = [[torch.arange(5)], [torch.arange(7)]], [[torch.arange(5), torch.arange(7)]]
    for accumulated in windows:
        model = Embedded()
        rectifier = Rectifier(model)
        for i, parts in enumerate(accumulated):
            forget = sum(model(ids) for ids in parts)
            retain = sum(model(ids.flip(0) % 3) for ids in parts)
            rectifier.backward(
                accumulate=i < len(accumulated) - 1,
                objective={"forget": -1.0}, forget=forget, retain=retain,
            )  # fmt: skip
        grads.append(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    torch.testing.assert_close(*grads)


def test_parameters_inside_of_a_reentrant_checkpoint_are_reached() -> None:
    class Checkpointed(Embedded):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids).requires_grad_()
            logits = checkpoint(self.head, hidden, use_reentrant=True)
            return nn.functional.cross_entropy(logits, ids)

    grads = []
    for kind in (Embedded, Checkpointed):
        model = kind()
        rectifier = Rectifier(model)
        forget, retain = model(torch.arange(5)), model(torch.arange(3))
        rectifier.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
        grads.append(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    assert torch.equal(*grads)


def test_the_forget_part_is_that_of_a_declared_objective() -> None:
    model = nn.Linear(2, 1, bias=False)
    forget, retain = model(torch.ones(2)).sum(), model(torch.tensor([1.0, -2.0])).sum()
    with pytest.raises(ValueError, match=r"declared as a combination .* Found a tensor. Pass wei"):
        Rectifier(model, part="forget").backward(objective=-forget + retain, retain=retain)
    results = []
    for part in ("total", "forget"):  # the same, where there is no retain term
        model.zero_grad()
        forget, retain = model(torch.ones(2)).sum(), model(torch.tensor([2.0, 1.0])).sum()
        rectifier = Rectifier(model, part=part)  # type: ignore[arg-type]
        rectifier.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
        results.append(model.weight.grad.clone())
    assert torch.equal(*results)


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


def test_a_state_that_is_loaded_leaves_nothing_of_a_window() -> None:
    pairs = tiny.pairs(2)
    grads = []
    for windowed in (False, True):
        model = tiny.llama()
        rectifier = Rectifier(model)
        state = rectifier.state_dict()
        if windowed:
            rectifier.backward(
                objective={"forget": -1.0}, accumulate=True, **losses_of(model, pairs[0])
            )
            rectifier.load_state_dict(state)
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pairs[1]))
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.equal(*grads)


def test_a_parameter_that_is_replaced_is_refused() -> None:
    model = two_layers()
    rectifier = Rectifier(model)
    x = torch.ones(3)
    rectifier.backward(objective=-model(x).sum(), retain=(model(x) ** 2).sum())
    model.zero_grad()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"stay the tensors that they were .* Found others"):
        rectifier.backward(objective=-model(x).sum(), retain=(model(x) ** 2).sum())


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": ()}, r"`protect` should be a sequence .* Found"),
        ({"protect": ("objective",)}, r"`protect` should be a sequence .* Found"),
        ({"protect": ("retain", "retain")}, r"`protect` should be a sequence .* Found"),
        ({"rule": "gru"}, r"`rule` should be a function .* Found 'gru'. Pass one"),
        ({"ema": True}, r"`ema` of Rectifier should be above 0"),
        ({"select": True}, r"`select` of Rectifier should be above 0"),
        ({"correction": "retain_adam"}, r'`correction` should be "retain" in gradient space'),
        ({"part": "forget", "space": "update"}, r'`part` should be "total" in update space'),
        ({"rule": SAGO(), "scope": "layer"}, r'should go with scope="model"'),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rectifier(nn.Linear(2, 1), **options)
