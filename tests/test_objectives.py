"""Objectives against naive loops, and the identities that define them."""

import copy

import pytest
import torch
from torch import nn

from geffect.objectives import (
    NPO,
    GradDiff,
    GradientAscent,
    Objective,
    WeightedGradientAscent,
    nll,
)
from tests import reference, tiny


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny.gpt2(seed=1)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)) for n in a)


def test_nll_is_the_token_mean(model: nn.Module) -> None:
    batch = tiny.batch(0)
    assert nll(model, batch).item() == pytest.approx(reference.nll(model, batch).item(), rel=1e-12)


def test_gradient_ascent_is_minus_nll(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    expected = -reference.nll(model, pair["forget"])
    assert GradientAscent()(model, pair).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_wga_has_the_gradient_of_the_powered_probability(model: nn.Module, alpha: float) -> None:
    pair = tiny.pairs(1)[0]
    log_p = [x for sample in reference.token_log_p(model, pair["forget"]) for x in sample]
    powered = torch.stack([(alpha * x).exp() / alpha for x in log_p]).mean()
    found = reference.gradient(model, WeightedGradientAscent(alpha)(model, pair))
    assert difference(found, reference.gradient(model, powered)) < 1e-8


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_npo_equals_its_formula_and_its_weights(
    model: nn.Module, other: nn.Module, beta: float
) -> None:
    pair = tiny.pairs(1)[0]
    npo = NPO(beta, reference=other)
    sums = [torch.stack(s).sum() for s in reference.token_log_p(model, pair["forget"])]
    with torch.no_grad():
        before = [torch.stack(s).sum() for s in reference.token_log_p(other, pair["forget"])]
    ratios = [beta * (s - o) for s, o in zip(sums, before, strict=True)]
    formula = 2 / beta * torch.stack([torch.log1p(x.exp()) for x in ratios]).mean()
    loss = npo(model, pair)
    assert loss.item() == pytest.approx(formula.item(), rel=1e-10)
    weights = [2 / (1 + (beta * (o - s.detach())).exp()) for s, o in zip(sums, before, strict=True)]
    torch.testing.assert_close(
        npo.weights(-torch.stack(sums), -torch.stack(before)), torch.stack(weights)
    )
    weighted = torch.stack([w * s for w, s in zip(weights, sums, strict=True)]).mean()
    assert difference(reference.gradient(model, loss), reference.gradient(model, weighted)) < 1e-8


def test_npo_starts_as_gradient_ascent_on_sequence_sums(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    sums = [torch.stack(s).sum() for s in reference.token_log_p(model, pair["forget"])]
    found = reference.gradient(model, NPO(0.3, copy.deepcopy(model))(model, pair))
    assert difference(found, reference.gradient(model, torch.stack(sums).mean())) < 1e-8


def test_npo_without_a_reference_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`reference` of NPO should be .* Found None. Pass"):
        NPO()(model, tiny.pairs(1)[0])


def test_graddiff_adds_the_weighted_retain_risk(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    parts = GradDiff(WeightedGradientAscent(2.0), weight=0.7).components(model, pair)
    assert {name: weight for name, (_, weight) in parts.items()} == {"forget": 1.0, "retain": 0.7}
    total = GradDiff(WeightedGradientAscent(2.0), weight=0.7)(model, pair)
    expected = parts["forget"][0] + 0.7 * parts["retain"][0]
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


OBJECTIVES = [GradientAscent(), WeightedGradientAscent(1.0), GradDiff(), GradDiff(NPO(0.5))]


def given(objective: Objective, other: nn.Module) -> Objective:
    inner = objective.forget if isinstance(objective, GradDiff) else objective
    return GradDiff(NPO(0.5, other)) if isinstance(inner, NPO) else objective


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_padding_and_row_order_change_nothing(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    objective = given(objective, other)
    plain = {"forget": tiny.batch(0), "retain": tiny.batch(1)}
    padded = {"forget": tiny.batch(0, padding=5), "retain": tiny.batch(1, padding=2)}
    shuffled = {side: {k: v[[2, 0, 1]] for k, v in b.items()} for side, b in plain.items()}
    for changed in (padded, shuffled):
        assert objective(model, changed).item() == pytest.approx(
            objective(model, plain).item(), rel=1e-10
        )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_descent_on_the_objective_raises_the_forget_risk(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    objective = given(objective, other)
    pair = tiny.pairs(1)[0]
    moved = copy.deepcopy(model)
    grads = reference.gradient(moved, objective(moved, pair))
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= 1e-4 * grads[name]
    assert nll(moved, pair["forget"]) > nll(model, pair["forget"])


@pytest.mark.parametrize("objective", [WeightedGradientAscent(1.0), NPO(1.0)], ids=repr)
def test_finite_where_every_probability_underflows(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    objective = NPO(1.0, other) if isinstance(objective, NPO) else objective
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in sharp.parameters():
            parameter *= 60
    loss = objective(sharp, tiny.pairs(1)[0])
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in reference.gradient(sharp, loss).values())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1.0"])
@pytest.mark.parametrize("make", [lambda x: NPO(beta=x), lambda x: WeightedGradientAscent(alpha=x),
                                  lambda x: GradDiff(weight=x)])  # fmt: skip
def test_settings_out_of_range_are_refused(make: object, value: object) -> None:
    with pytest.raises(ValueError, match=r"should be a positive number. Found .* Pass"):
        make(value)  # type: ignore[operator]


def test_a_batch_without_labels_is_refused(model: nn.Module) -> None:
    batch = tiny.batch(0)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"should have the key `labels`.* Found .* Add labels"):
        nll(model, batch)
