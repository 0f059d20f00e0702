"""In half precision a correction may be smaller than a rounding: what is written is kept to it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import violation
from geffect.layers import describe
from geffect.projection import nearest, off_span, orthogonal
from geffect.projection.options import LABELS
from geffect.projection.rounding import enlarged
from tests.utils.trainers import same

RATE = 1e-5


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)


def losses(model: nn.Module, step: int, *names: str) -> dict[str, Tensor]:
    """Regressions on random data: those of the retain sets conflict with ascent on the first."""
    draw = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    found, x = {}, torch.randn(16, 24, generator=draw)
    for name in ("forget", *names):
        inputs = (x + 0.5 * torch.randn(16, 24, generator=draw)).to(dtype)
        found[name] = (model(inputs).float().flatten() - x[:, 0]).square().mean()
    return found


def trained(
    *,
    rule: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    steps: range = range(8),
    space: Any = "update",
    path: Path | None = None,
    begun: Any = None,
    **options: Any,
) -> Any:
    """Model, optimizer and rectifier after some steps, with every applied update and average."""
    model = network(dtype)
    kind = torch.optim.AdamW if dtype == torch.bfloat16 else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=RATE if dtype == torch.bfloat16 else 1e-4)
    protect = options.get("protect", ("retain",))
    given = {} if rule is None else {"rule": rule}
    rectifier = Rectifier(model, **given, space=space, ema=0.3, optimizer=optimizer, **options)
    for owner, state in zip((model, optimizer, rectifier), begun or (), strict=False):
        owner.load_state_dict(copy.deepcopy(state))
    recorder = None if path is None else Recorder(model, path, update=True)
    seen = []
    for step in steps:
        before = [p.detach().double() for p in model.parameters()]
        optimizer.zero_grad()
        told = {"objective": {"forget": -1.0}, **losses(model, step, *protect)}
        if recorder is None:
            rectifier.backward(**told)
        else:
            recorder.backward(rectifier=rectifier, **told)
        grads = [p.grad.double() for p in model.parameters()]
        optimizer.step()
        moved = [b - p.detach().double() for b, p in zip(before, model.parameters(), strict=True)]
        averages = [
            [r.double().clone() for r in average if r is not None]
            for average in rectifier.watched.values()
        ]
        seen.append((grads if space == "gradient" else moved, averages))
    if recorder is not None:
        recorder.close()
    return (model, optimizer, rectifier), seen


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (a, b))
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


WAYS: dict[str, dict[str, Any]] = {
    "model": {},
    "layer": {"scope": "layer"},
    "parameter": {"scope": "parameter"},
    "orthogonal": {"rule": orthogonal},
    "retain adam": {"correction": "retain_adam"},
    "selected": {"select": 0.5},
    "nearest": {"rule": nearest, "protect": ("retain", "world")},
    "off span": {"rule": off_span, "protect": ("retain", "world")},
    "gradient": {"space": "gradient"},
    "gradient, layer": {"space": "gradient", "scope": "layer"},
    "gradient, nearest": {"space": "gradient", "rule": nearest, "protect": ("retain", "world")},
    "float16": {"dtype": torch.float16},
    "float16, gradient": {"dtype": torch.float16, "space": "gradient"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_harms_nothing(way: str) -> None:
    (_, _, rectifier), seen = trained(**WAYS[way])
    fired = 0
    label = LABELS[WAYS[way].get("scope", "model")]
    blocks = [
        [i for i, p in enumerate(describe(network())) if label(p) == name]
        for name in {label(p) for p in describe(network())}
    ]
    for direction, averages in seen:
        for average in averages:
            for block in blocks:
                found = cosine([direction[i] for i in block], [average[i] for i in block])
                assert found > -1e-6
                fired += abs(found) < 1e-2
    assert fired and rectifier.report is not None


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def test_rounding_alone_would_harm() -> None:
    """Naive: the exact correction of each applied step, rounded to the nearest bfloat16."""
    model, harmful, r = network(), 0, None
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for step in range(8):
        before, both = flat(parameters), losses(model, step, "retain")
        fresh = flat(torch.autograd.grad(both["retain"], parameters))
        r = fresh if r is None else 0.3 * fresh + 0.7 * r
        optimizer.zero_grad()
        (-both["forget"]).backward()
        optimizer.step()
        u = before - flat(parameters)
        x = u - min(0.0, float(u @ r)) / (r @ r) * r
        with torch.no_grad():
            nn.utils.vector_to_parameters((before - x).bfloat16(), parameters)
        harmful += cosine([before - flat(parameters)], [r]) < -1e-6
    assert harmful >= 4


def test_the_rate_of_violation_in_the_file_is_zero(tmp_path: Path) -> None:
    watched, _ = trained(path=tmp_path / "run.h5")
    run = open_run(tmp_path / "run.h5")
    assert violation(run, by="model")["value"].sum() == 0
    assert run.rectification()[1]["fired"].sum() >= 4
    K = run.gram().sum(axis=1)
    d, r = run.index("update"), run.index("retain_ema")
    assert (K[:, d, d] > 0).all() and (K[:, d, r] <= 1e-6 * np.sqrt(K[:, d, d] * K[:, r, r])).all()
    alone, _ = trained()
    assert all(
        same(a.state_dict(), b.state_dict()) for a, b in zip(watched[:2], alone[:2], strict=True)
    )


def test_stopped_and_resumed_it_is_the_same_bit_for_bit() -> None:
    whole, _ = trained()
    first, _ = trained(steps=range(5))
    begun = [owner.state_dict() for owner in first]
    rest, _ = trained(steps=range(5, 8), begun=begun)
    for a, b in zip(whole[:2], rest[:2], strict=True):
        assert same(a.state_dict(), b.state_dict())


def test_the_multiple_is_the_smallest_that_suffices() -> None:
    model = nn.Linear(400, 1, bias=False).bfloat16()
    torch.manual_seed(1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 400))
    before, r = model.weight.detach().double()[0], torch.randn(400).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-7)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    u = torch.randn(400).bfloat16() - 0.2 * r
    rectifier.backward(objective=model(u).sum(), retain=model(r).sum())
    optimizer.step()
    left = before - model.weight.detach().double()[0]
    twin = (model.weight.detach() * 0)[0].double()
    stepped = before.bfloat16() - (2.0**-7) * u
    direction = before - stepped.double()

    def written(multiple: float) -> Tensor:
        x = direction + multiple * r.double()
        return before - (before - x).bfloat16().double() + twin

    report = rectifier.report
    assert report is not None
    (multiple,) = report.coefficient
    assert torch.equal(written(multiple), left) and float(left @ r.double()) >= 0
    needed = next(k for k in np.linspace(0, multiple, 2000) if float(written(k) @ r.double()) >= 0)
    assert multiple <= 1.1 * needed


def test_a_block_for_which_nothing_suffices_does_not_move() -> None:
    def measure(weights: Tensor) -> tuple[Tensor, Tensor]:
        K = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double().expand(2, 2, 2).clone()
        K[0, 0, 1] = K[0, 1, 0] = 1.0
        K[:, 0] *= (weights[:, :1] != 0).double()
        return K, K

    weights = torch.tensor([[1.0, 0.5], [1.0, 0.5]]).double()
    found, _ = enlarged(weights, torch.tensor([True, True]), measure)
    assert found.tolist() == [[1.0, 0.5], [0.0, 0.0]]


def backwards(K: Tensor) -> Tensor:
    """Weights of a rule that promises nothing: it takes the retain gradient away."""
    return torch.stack([torch.ones_like(K[..., 0, 0]), -K[..., 0, 0] / K[..., 1, 1]], dim=-1)


def test_a_rule_that_promises_nothing_is_written_as_it_is() -> None:
    (_, _, rectifier), seen = trained(rule=backwards)
    assert any(cosine(direction, averages[0]) < -1e-3 for direction, averages in seen)
    assert rectifier.skipped == 0
