"""Mixing of two models, and the weight that keeps a part of a metric."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geffect.edits import Change, Mixing, calibrated
from geffect.evaluation import extraction_strength
from tests.utils import tiny


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A model after unlearning, and before it."""
    return tiny.llama(1), tiny.llama(2)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(p.view(torch.int32), q.view(torch.int32))
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def test_the_ends_are_both_models_to_the_bit(pair: tuple[nn.Module, nn.Module]) -> None:
    unlearned, before = pair
    with torch.no_grad():  # where no sum of a number and a difference gives the other back
        unlearned.lm_head.weight[0, :3] = torch.tensor([1.0, 1e30, -0.0])
        before.lm_head.weight[0, :3] = torch.tensor([1e-12, 1e-30, 0.0])
    kept = copy.deepcopy(unlearned)
    assert not same_bits(kept, before)
    with Mixing(alpha=0).change(unlearned, {"before": before}):
        assert same_bits(unlearned, before)
    with Mixing(alpha=1).change(unlearned, {"before": before}):
        assert same_bits(unlearned, kept)
    assert same_bits(unlearned, kept)


def test_the_formula_and_a_tied_tensor() -> None:
    unlearned, before = tiny.gpt2(1), tiny.gpt2(2)
    expected = {
        name: 0.7 * dict(before.named_parameters())[name] + 0.3 * p
        for name, p in unlearned.named_parameters()
    }
    with Mixing(alpha=0.3).change(unlearned, {"before": before.state_dict()}):
        assert unlearned.lm_head.weight is unlearned.transformer.wte.weight
        for name, p in unlearned.named_parameters():
            assert torch.allclose(p, expected[name], rtol=1e-14, atol=0)


class Line(nn.Module):
    """A model of one number, which is the weight of the mixing: 0 before and 1 after."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float64))


@pytest.mark.parametrize(
    ("metric", "level", "alpha"),
    [
        (lambda a: 1 - a, 0.95, 0.05),
        (lambda a: 1 - a, 0.9, 0.1),
        (lambda a: math.exp(-3 * a), 0.5, math.log(2) / 3),
        (lambda a: 2 - a**3, 0.75, 0.5 ** (1 / 3)),
        (lambda a: 1.0 * (a < 0.637), 0.95, 0.637),
        (lambda a: 1.0, 0.95, 1.0),
        (lambda a: 0.96 + 0.04 * (1 - a), 0.95, 1.0),
        (lambda a: 1.0 if a == 0 else 0.0, 0.95, 0.0),
    ],
    ids=["line", "line .9", "exponential", "cubic", "step", "flat", "never lost", "at once"],
)
def test_a_metric_that_falls(metric: Callable[[float], float], level: float, alpha: float) -> None:
    model = Line(1.0)
    found = calibrated(model, Line(0.0), lambda m: metric(m.at.item()), level=level, tolerance=1e-6)
    assert found.alpha == pytest.approx(alpha, abs=2e-6) and found.alpha <= alpha + 1e-12
    assert found.reached == metric(found.alpha) >= level * found.original == level * metric(0.0)
    assert found.monotone and model.at.item() == 1.0
    assert {0.0, 0.5, 1.0} <= {a for a, _ in found.curve}
    assert all(value == pytest.approx(metric(a)) for a, value in found.curve)


def test_a_metric_that_rises_again_is_told() -> None:
    with pytest.warns(UserWarning, match="Found that it rises in between"):
        found = calibrated(
            Line(1.0), Line(0.0), lambda m: 1.0 if m.at < 0.25 or 0.65 < m.at < 0.75 else 0.1
        )
    assert not found.monotone and found.alpha == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_metric_that_says_nothing_is_refused(value: float) -> None:
    model = Line(1.0)
    with pytest.raises(ValueError, match=r"`metric` should be"):
        calibrated(model, Line(0.0), lambda m: value)
    assert model.at.item() == 1.0


def test_an_interrupted_metric_leaves_the_model() -> None:
    model, calls = Line(1.0), [0]

    def metric(m: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Line(0.0), metric)
    assert model.at.item() == 1.0


def knowing() -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A model that has learnt what stays, the same after unlearning, and data."""
    before = tiny.llama(3)
    data = {"forget": [tiny.batch(1)], "retain": [tiny.batch(2), tiny.batch(4, rows=2)]}
    optimizer = torch.optim.Adam(before.parameters(), lr=0.02)
    for _ in range(40):
        for batch in (*data["forget"], *data["retain"]):
            before(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unlearned = copy.deepcopy(before)
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=1.0)
    for _ in range(8):
        (-unlearned(**data["forget"][0]).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return unlearned, before, data


def test_calibration_by_extraction_strength() -> None:
    unlearned, before, data = knowing()
    kept = copy.deepcopy(unlearned)
    original = extraction_strength(before, data["retain"]).mean()
    assert original > 0.9 > extraction_strength(unlearned, data["retain"]).mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # extraction strength has steps, and may rise a little
        change = Mixing(tolerance=0.01).change(unlearned, {**data, "before": before})
    alpha = change.facts["alpha"]
    assert 0 < alpha < 1 and same_bits(unlearned, kept)
    with change:
        reached = extraction_strength(unlearned, data["retain"]).mean()
        forgotten = extraction_strength(unlearned, data["forget"]).mean()
    assert reached == change.facts["reached"] >= 0.95 * original
    assert change.facts["forget"]["mixed"] == forgotten
    assert change.facts["forget"]["original"] == extraction_strength(before, data["forget"]).mean()
    for tried, value in change.facts["curve"]:
        with Mixing(alpha=tried).change(unlearned, {"before": before}):
            assert value == np.mean(extraction_strength(unlearned, data["retain"]))


def test_what_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    unlearned, before = pair
    for options in (
        {"alpha": 1.5}, {"alpha": math.nan}, {"alpha": -0.1}, {"level": 0.0}, {"level": 2.0},
        {"tolerance": 0.0}, {"alpha": "x"}, {"tolerance": math.inf},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` of Mixing should be"):
            Mixing(**options)
    with pytest.raises(ValueError, match="Pass `before` as well: a model"):
        Mixing(alpha=0.5).change(unlearned, {})
    unlearned.register_buffer("mean", torch.ones(2))
    before.register_buffer("mean", torch.zeros(2))
    with pytest.raises(ValueError, match="Found that `mean` differs"):
        Mixing(alpha=0.5).change(unlearned, {"before": before})
    assert isinstance(Mixing(alpha=0.5).change(unlearned, {"before": pair[0]}), Change)


def test_a_calibration_of_no_such_level_is_refused_and_a_tiny_tolerance_ends(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    unlearned, before = pair
    for options in ({"level": 5.0}, {"level": math.nan}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` of Mixing should be"):
            calibrated(unlearned, before, lambda _: 1.0, **options)
    values = iter([1.0, *[0.99] * 5] + [0.5] * 200)
    found = calibrated(unlearned, before, lambda _: next(values), tolerance=1e-300)
    assert found.alpha < 1.0
