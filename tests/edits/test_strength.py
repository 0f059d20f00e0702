"""How strong an edit has to be: bisection against what is known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from geffect.edits import Change, Varied, named
from tests.utils import tiny


def linear(metric: Any, *, level: float, between: tuple[float, float]) -> Any:
    """A weight that is as large as the strength, and what is found for a metric of it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def change(strength: float) -> Change:
        return Change(model, {"weight": torch.tensor([[strength]])})

    found = Varied(model, change).reaching(
        lambda model: metric(model.weight.item()), level=level, between=between
    )
    assert model.weight.item() == 0.0
    return found


def test_the_least_strength_that_reaches_the_level() -> None:
    found = linear(lambda x: x * x, level=2.0, between=(0.01, 100.0))
    assert found.value == pytest.approx(math.sqrt(2.0), rel=1e-3)
    assert found.reached == pytest.approx(2.0, rel=2e-3) and found.reached >= 2.0
    assert [strength for strength, _ in found.curve] == sorted({s for s, _ in found.curve})
    # What falls again is found where it rises for the first time.
    wave = linear(lambda x: math.sin(x), level=0.5, between=(0.1, 50.0))
    assert wave.value == pytest.approx(math.pi / 6, rel=2e-3)


def test_a_jump_over_the_level_is_found_on_its_far_side() -> None:
    found = linear(lambda x: 5.0 * (x >= 0.3), level=1.0, between=(0.01, 1.0))
    assert found.value == pytest.approx(0.3, rel=1e-3) and found.reached == 5.0


def test_what_is_not_reached_has_no_value() -> None:
    found = linear(lambda x: min(x, 0.5), level=1.0, between=(0.01, 10.0))
    assert found.value is found.reached is None
    assert max(value for _, value in found.curve) == 0.5
    # Beyond the level there is nothing that is finite.
    broken = linear(lambda x: math.nan if x > 0.1 else x, level=1.0, between=(0.01, 10.0))
    assert broken.value is None
    at_once = linear(lambda x: 1.0 + x, level=1.0, between=(0.01, 10.0))
    assert at_once.value == 0.01


@pytest.mark.parametrize("between", [(0.0, 1.0), (1.0, 0.5), (-1.0, 1.0), (1.0, 1.0)])
def test_strengths_that_are_refused(between: Any) -> None:
    with pytest.raises(ValueError, match="two positive strengths"):
        linear(lambda x: x, level=1.0, between=between)


@pytest.mark.parametrize(
    ("name", "option", "options", "values"),
    [
        ("ssd", "fraction", {}, (0.01, 0.3)),
        ("ssd", "alpha", {}, (0.5, 2.0)),
        ("lfssd", "dampening", {"fraction": 0.2}, (0.1, 0.7)),
        ("negation", "alpha", {}, (0.5, 2.0)),
        ("mix", "alpha", {}, (0.25, 0.5)),
        ("repselect", "length", {"k": 2}, (0.1, 3.0)),
        ("repselect", "k", {}, (1, 2)),
        ("newton", "length", {"scale": 150.0, "steps": 8}, (0.5, 4.0)),
    ],
)
def test_an_edit_at_several_strengths_is_that_edit_at_each(
    name: str, option: str, options: dict[str, Any], values: tuple[float, float]
) -> None:
    model, other = tiny.llama(), tiny.llama(seed=1)
    edit = named(name, options)
    data = {"forget": [tiny.batch(1, rows=2)], "retain": [tiny.batch(5, rows=4)]}
    data |= dict.fromkeys(edit.states, other)
    varied = Varied.of(edit, option, model, data)
    for value in values:
        expected = named(name, {**options, option: value}).displacement(model, data)
        found = varied.change(value).displacement
        assert found.keys() == expected.keys() and any(d.any() for d in found.values())
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_data_that_an_edit_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="Pass `retain` as well"):
        Varied.of(named("ssd"), "fraction", tiny.llama(), {"forget": [tiny.batch(1)]})
