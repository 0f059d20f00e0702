"""Selections: the coordinates that a step may change, whatever else is done to it."""

import math
import warnings
from typing import Any

import pytest
import torch

from geffect import Rectifier
from geffect.objectives import nll
from geffect.projection import SaliencyMask
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import cosines, losses_of, placed, run, two_layers


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


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_gru_projects_what_the_mask_of_ssu_leaves(c: float) -> None:
    """The mask comes first: so what is stepped does not harm the retain gradient."""
    model = tiny.llama()
    losses = {side: nll(model, batch) for side, batch in tiny.pairs(1)[0].items()}
    u = -reference.flat(reference.gradient(model, losses["forget"]))
    r = reference.flat(reference.gradient(model, losses["retain"]))
    size = u.abs().double()
    kept = size >= size.mean() + c * size.std(correction=0)
    expected = reference.gru(u * kept, r * kept)
    other_order = reference.gru(u, r) * kept
    assert torch.dot(u * kept, r) < 0 <= torch.dot(expected, r) + 1e-6
    rectifier = Rectifier(model, select=SaliencyMask(c))
    rectifier.backward(objective={"forget": -1.0}, **losses)
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, other_order, rtol=1e-4, atol=1e-7)
    assert rectifier.options["select"] == f"SaliencyMask(c={c})"
    assert str(rectifier.options["rule"]).startswith("gru")


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


PLACES: list[dict[str, Any]] = [
    {"space": space, **options}
    for space in ("gradient", "update")
    for options in ({"rule": None}, {}, {"scope": "layer"}, {"scope": "coordinate"})
]


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_a_selection_holds_from_the_first_step_on(options: dict[str, Any]) -> None:
    """Also where the retain gradient is zero or rounding noise, as a retain term may begin."""
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    told = {**options, **placed(options["space"], optimizer)}
    rectifier = Rectifier(model, select=0.05, **told)
    sizes = [0.0, 1e-12, 0.0, 0.0, 1e-12, 1e-12, 1.0, 1e-12, 0.0, 1.0]
    counted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size, pair in zip(sizes, tiny.pairs(len(sizes)), strict=True):
            optimizer.zero_grad()
            losses = losses_of(model, pair)
            before = [p.detach().clone() for p in model.parameters()]
            u = reference.flat(reference.gradient(model, losses["forget"])).abs()
            rectifier.backward(
                objective={"forget": -1.0}, forget=losses["forget"], retain=size * losses["retain"]
            )
            optimizer.step()
            counted += size == 1.0
            assert rectifier._memory._count == counted
            moved = torch.cat(
                [
                    (p.detach() != old).flatten()
                    for p, old in zip(model.parameters(), before, strict=True)
                ]
            )
            share = float(moved.float().mean())
            # Where r counts, a rule for every coordinate stops some of what was selected.
            stops = options.get("scope") == "coordinate" and size == 1.0
            assert 0.01 < share <= 0.06 if stops else share == pytest.approx(0.05, rel=0.15)
            if counted == 0:  # without a mean square those of the largest gradient
                assert u[moved].min() >= 0.9 * torch.quantile(u, 0.95)
            assert rectifier.report is not None and set(rectifier.report.fired) <= {0.0, 1.0}
            assert math.isnan(rectifier.report.inner_before[0]) == (size != 1.0)
    assert rectifier.skipped == len(sizes) - counted


def test_noise_stays_out_of_the_average_that_it_would_have_begun() -> None:
    averages = []
    for sizes in ([1e-12, 0.0, 1e-12, 1.0], [0.0, 0.0, 0.0, 1.0]):
        model = tiny.llama()
        rectifier = Rectifier(model, None, ema=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for size, pair in zip(sizes, tiny.pairs(4), strict=True):
                model.zero_grad()
                losses = losses_of(model, pair)
                losses["retain"] = size * losses["retain"]
                rectifier.backward(objective={"forget": -1.0}, **losses)
        averages.append(rectifier.watched["retain_ema"])
    assert all(map(torch.equal, *averages))
    r = reference.gradient(model, nll(model, tiny.pairs(4)[3]["retain"]))
    assert all(map(torch.equal, averages[0], r.values()))


@pytest.mark.parametrize("accumulate", [False, True])
def test_noise_is_told_in_a_window_and_with_losses_of_one_forward(accumulate: bool) -> None:
    model = tiny.llama()
    rectifier = Rectifier(model)
    pairs = tiny.pairs(2)
    with pytest.warns(UserWarning, match="the retain gradient is rounding noise beside the obj"):
        for place, pair in enumerate(pairs if accumulate else pairs[:1]):
            losses = losses_of(model, pair)
            if not accumulate:
                losses["retain"] = losses["retain"] + losses["forget"]
            losses["retain"] = 1e-12 * losses["retain"]
            rectifier.backward(
                objective={"forget": -1.0}, accumulate=accumulate and place == 0, **losses
            )
    assert rectifier.skipped == 1 and not rectifier._memory.ready
