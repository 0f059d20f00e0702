"""Scopes: a constraint each for the model, groups, layers, parameters and coordinates."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.layers import describe
from geffect.objectives import nll
from geffect.projection import (
    nearest,
    off_span,
)
from tests.utils import reference, tiny
from tests.utils.rectified import losses_of, placed


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
    assert report.blocks == rectifier.blocks and len(report.blocks) == 5
    retain = reference.gradient(model, nll(model, pair["retain"]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    by_layer = {
        layer: [n for n in retain if f".{i}." in n]
        for i, layer in enumerate(f"layer {i}" for i in range(2))
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
    assert model.weight.grad is None  # not the gradient that was to be rectified


@pytest.mark.parametrize("scope", ["group", "layer", "parameter"])
def test_every_block_of_a_scope_keeps_its_constraint(scope: Any) -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, scope=scope)
    pair = tiny.pairs(1)[0]
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    retain = reference.gradient(model, nll(model, pair["retain"]))
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
