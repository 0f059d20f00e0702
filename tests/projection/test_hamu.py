"""HAMU: the gain is had at the least retain cost within the radius, or that it is not is said."""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import rectification
from geffect.projection import free_forgetting, hamu
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import losses_of
from tests.utils.vectors import gram, step, tensors

K = torch.tensor([[4.0, -3.0], [-3.0, 9.0]]).double()  # K_ff 4, K_rr 9, K_fr 3; u = -g_f
RATE = 0.1


def public(u: Tensor, r: Tensor, gain: float, radius: float) -> tuple[Tensor, str]:
    """theta before minus theta after as the public code has it, and which of its cases that is."""
    forget = -u
    if gain / forget.norm() > radius:
        return -gain * forget / forget.norm() ** 2, "infeasible"
    down = -radius * r / r.norm()
    if forget @ down >= gain:
        return -down, "retain alone"
    t = r - (r @ forget) / forget.norm() ** 2 * forget
    rest = (radius**2 - gain**2 / forget.norm() ** 2) ** 0.5
    return -(gain * forget / forget.norm() ** 2 - rest * t / t.norm()), "both"


def test_the_worked_example() -> None:
    found = free_forgetting(K, learning_rate=RATE).item()
    assert round(found, 6) == 0.519615
    assert found > 0.5 and not found > 0.52  # a step of .5 goes on, one of .52 stops
    assert free_forgetting(K, radius=0.3).item() == pytest.approx(found, rel=1e-14)
    x = hamu(gain=0.5, learning_rate=RATE)(K)
    rise, change = RATE * (K @ x) * torch.tensor([1.0, -1.0])
    assert rise.item() == pytest.approx(0.5, rel=1e-14)
    assert round(change.item(), 4) == -0.0558
    assert RATE * (x @ K @ x).item() ** 0.5 == pytest.approx(0.3, rel=1e-14)
    harmful = hamu(gain=0.52, learning_rate=RATE)(K)
    assert (K @ harmful)[1] < 0  # the retain risk rises from there on


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gain", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("radius", [None, 0.02, 0.5, 40.0])
def test_every_case_is_that_of_the_formula(seed: int, gain: float, radius: float | None) -> None:
    draw = torch.Generator().manual_seed(seed)
    u, r = torch.randn(2, 5, dtype=torch.float64, generator=draw)
    if seed % 2:
        r = r + 2 * u  # the retain step gains by itself
    rule = hamu(gain, radius=radius, learning_rate=RATE)
    R = RATE * r.norm().item() if radius is None else radius
    expected, case = public(u, r, gain, R)
    torch.testing.assert_close(RATE * step(rule, u, r), expected, rtol=1e-10, atol=1e-12)
    assert rule.promise is not None
    products = gram(torch.stack([u, r]))
    assert rule.promise.broken(products, rule(products)).item() == (case == "infeasible")


def test_all_three_cases_are_there() -> None:
    u, r = tensors([2.0, 0.0], [1.0, 2.0])
    cases = [public(u, r, *of)[1] for of in ((1.0, 0.1), (0.1, 1.0), (1.0, 0.6))]
    assert cases == ["infeasible", "retain alone", "both"]


@pytest.mark.parametrize("seed", range(4))
def test_no_step_within_the_radius_gains_as_much_and_costs_less(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    u, r = torch.randn(2, 3, dtype=torch.float64, generator=draw)
    gain, radius = 0.3 * u.norm().item(), 0.5
    x = step(hamu(gain, radius=radius), u, r)
    assert x.norm() <= radius * (1 + 1e-12) and x @ u >= gain * (1 - 1e-12)
    others = torch.randn(200_000, 3, dtype=torch.float64, generator=draw)
    others = radius * others / others.norm(dim=1, keepdim=True)
    others = others * torch.rand(len(others), 1, dtype=torch.float64, generator=draw) ** 0.1
    allowed = others[others @ u >= gain]
    assert len(allowed) > 100
    best = (allowed @ r).max()
    assert best <= x @ r <= best + 0.05 * radius * r.norm()


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e100])
def test_units_do_not_matter(scale: float) -> None:
    u, r = tensors([1.0, 2.0, 0.0], [-1.0, 0.5, 3.0])
    x = step(hamu(gain=0.2, radius=0.3), u, r)
    longer = step(hamu(gain=0.2 * scale, radius=0.3), scale * u, scale * r)
    torch.testing.assert_close(longer, x, rtol=1e-9, atol=0)


def test_gradients_along_a_line_and_gradients_of_zero() -> None:
    u, zero = tensors([3.0, 4.0], [0.0, 0.0])
    least = 0.5 * u / 25
    with_radius, without = hamu(0.5, radius=1.0), hamu(0.5)
    for r in (-2 * u, 1e-3 * -u, zero):
        torch.testing.assert_close(step(with_radius, u, r), least)
    torch.testing.assert_close(step(with_radius, u, 7 * u), u / 5)  # the retain step gains 5
    assert torch.equal(step(with_radius, zero, u), zero)
    for r, broken in ((zero, True), (u, False)):
        products = gram(torch.stack([u, r]))
        assert without.promise is not None
        assert without.promise.broken(products, without(products)).item() is broken
    nothing = gram(torch.stack([zero, u]))
    assert with_radius.promise is not None
    assert with_radius.promise.broken(nothing, with_radius(nothing)).item() is True


def test_blocks_share_gain_and_radius() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 2, 6, dtype=torch.float64, generator=draw)
    blocks[2, 0] = 0.0  # three of them can gain
    K, rule = blocks @ blocks.mT, hamu(0.6, radius=2.0)
    x = torch.einsum("bk,bki->bi", rule(K), blocks)
    for i in (0, 1, 3):
        expected, _ = public(*blocks[i], 0.6 / 3, 2.0 / 3**0.5)
        torch.testing.assert_close(x[i], expected, rtol=1e-10, atol=1e-12)
    assert not x[2].any() and x.norm() == pytest.approx(2.0, rel=1e-12)
    assert (x * blocks[:, 0]).sum() >= 0.6
    assert rule.promise is not None and not rule.promise.broken(K, rule(K)).any()


@pytest.mark.parametrize("scope", ["model", "parameter"])
@pytest.mark.filterwarnings("ignore:A step is not what its rule promises")
def test_a_step_of_gradient_descent_takes_the_gain(scope: Any) -> None:
    model = tiny.gpt2()
    (pair,) = tiny.pairs(1)
    rate, gain, radius = 1e-2, 1e-5, 5e-4
    parameters = list(model.parameters())
    u, r = (
        [sign * g for g in torch.autograd.grad(losses_of(model, pair)[side], parameters)]
        for side, sign in (("forget", -1.0), ("retain", 1.0))
    )
    rule = hamu(gain, radius=radius, learning_rate=rate)
    rectifier = Rectifier(model, rule, scope=scope, ema=1.0)
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    step = [rate * p.grad for p in parameters if p.grad is not None]
    assert len(step) == len(parameters)
    blocks = [range(len(step))] if scope == "model" else [[i] for i in range(len(step))]
    live = [own for own in blocks if any(u[i].any() for i in own)]
    for own in live:
        flat = [torch.cat([v[i].flatten() for i in own]) for v in (u, r, step)]
        share = (gain / len(live), radius / len(live) ** 0.5)
        expected, _ = public(flat[0], flat[1], *share)
        # The averages are float32.
        torch.testing.assert_close(flat[2], expected, rtol=1e-4, atol=1e-6 * expected.norm().item())
    had = sum(float((a * b).sum()) for a, b in zip(step, u, strict=True))
    assert had >= gain * (1 - 1e-5)  # of several blocks some gain more on the way
    assert scope != "model" or had == pytest.approx(gain, rel=1e-5)
    before = losses_of(model, pair)["forget"].item()
    torch.optim.SGD(parameters, lr=rate).step()
    assert losses_of(model, pair)["forget"].item() - before == pytest.approx(had, rel=0.05)


def test_an_infeasible_gain_is_said_once_and_marked_in_report_and_file(tmp_path: Path) -> None:
    model = tiny.gpt2()
    rectifier = Rectifier(model, hamu(gain=50.0, radius=1e-3), ema=1.0)
    pairs = tiny.pairs(3)
    with Recorder(model, tmp_path / "run.h5") as recorder, warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, pair in enumerate(pairs):
            model.zero_grad()
            losses = losses_of(model, pair)
            if number == 0:
                said = r"not what its rule promises. hamu\(gain=50.0, .*longer than its radius"
                with pytest.warns(UserWarning, match=said):
                    recorder.backward(objective={"forget": -1.0}, **losses, rectifier=rectifier)
            else:
                recorder.backward(objective={"forget": -1.0}, **losses, rectifier=rectifier)
            assert rectifier.report is not None and rectifier.report.unmet == (1.0,)
            grad = torch.cat([p.grad.flatten() for p in model.parameters()])
            u = -reference.flat(reference.gradient(model, losses_of(model, pair)["forget"]))
            assert grad.norm().item() == pytest.approx(50 / u.norm().item(), rel=1e-5)
    run = open_run(tmp_path / "run.h5")
    assert run.rectification()[1]["unmet"].ravel().tolist() == [1.0] * 3
    table = rectification(run)
    assert table.query("quantity == 'unmet'")["value"].tolist() == [1.0] * 3
    assert run.manifest["rectifier"]["rule"] == "hamu(gain=50.0, radius=0.001, learning_rate=1.0)"


def test_a_feasible_gain_is_no_news() -> None:
    model = tiny.gpt2()
    rectifier = Rectifier(model, hamu(gain=1e-4, radius=1.0), ema=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, tiny.pairs(1)[0]))
    assert rectifier.report is not None and rectifier.report.unmet == (0.0,)


def test_parameters_that_no_retain_loss_reaches_share_the_gain_too() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)).double()
    x = torch.tensor([1.0, 2.0, 3.0]).double()
    rule = hamu(gain=0.4, radius=1.0)
    rectifier = Rectifier(model, rule, scope="parameter", ema=1.0)
    rectifier.backward(objective=model[0](x) + model[1](x), retain=model[0](-x))
    for layer in model:
        assert (layer.weight.grad @ x).item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gain", 0.0), ("gain", -1.0), ("gain", math.nan), ("gain", math.inf), ("gain", True),
        ("gain", "0.1"), ("gain", None), ("radius", 0), ("radius", -0.5), ("learning_rate", 0.0),
        ("learning_rate", None),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` of hamu should be .* above 0\. Found .* Pass"):
        hamu(**{"gain": 0.1, name: value})


def test_it_is_refused_where_lengths_have_no_meaning() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="length of the retain gradient"):
        Rectifier(model, hamu(0.1), space="update")
    with pytest.raises(ValueError, match="should be given one retain gradient"):
        Rectifier(model, hamu(0.1), protect=("retain", "world"))


def test_it_travels_and_shows_its_numbers() -> None:
    rule = hamu(0.5, radius=2.0, learning_rate=RATE)
    for other in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert repr(other) == repr(rule) == "hamu(gain=0.5, radius=2.0, learning_rate=0.1)"
        assert torch.equal(other(K), rule(K))
