"""Objectives against naive loops, and the identities that define them."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geffect.objectives import (
    CEU,
    NPO,
    TNPO,
    WTNPO,
    FrozenModel,
    GradDiff,
    GradientAscent,
    Objective,
    Regularised,
    SatImp,
    SharedForward,
    SimNPO,
    WeightedGradientAscent,
    nll,
    statistics,
)
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.predictions import predicting


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny.gpt2(seed=1).eval()


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
    npo = NPO(beta)
    sums = [torch.stack(s).sum() for s in reference.token_log_p(model, pair["forget"])]
    with torch.no_grad():
        before = [torch.stack(s).sum() for s in reference.token_log_p(other, pair["forget"])]
    ratios = [beta * (s - o) for s, o in zip(sums, before, strict=True)]
    formula = 2 / beta * torch.stack([torch.log1p(x.exp()) for x in ratios]).mean()
    loss = npo(model, pair, FrozenModel(other))
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
    found = reference.gradient(model, NPO(0.3)(model, pair, FrozenModel.copied(model)))
    assert difference(found, reference.gradient(model, torch.stack(sums).mean())) < 1e-8


def both_log_p(model: nn.Module, other: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the answer tokens of one batch under both models, one token at a time."""
    batch = tiny.pairs(1)[0]["forget"]
    now, before = (
        torch.stack([x for sample in reference.token_log_p(m, batch) for x in sample])
        for m in (model, other)
    )
    return now, before.detach()


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_tnpo_has_the_gradient_of_its_closed_form(
    model: nn.Module, other: nn.Module, beta: float
) -> None:
    log_p, before = both_log_p(model, other)
    closed = 2 / beta * torch.log1p((beta * (log_p - before)).exp()).mean()
    loss = TNPO(beta)(model, tiny.pairs(1)[0], FrozenModel(other))
    assert difference(reference.gradient(model, loss), reference.gradient(model, closed)) < 1e-8


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_wtnpo_weighs_tokens_by_its_formula(model: nn.Module, other: nn.Module, eps: float) -> None:
    log_p, log_p_o = both_log_p(model, other)
    p, p_o = log_p.exp().detach(), log_p_o.exp()
    weights = 2 * p ** (2.0 + 0.5) / (p**2.0 + p_o**2.0 + eps)
    objective, before = WTNPO(2.0, eps, alpha=0.5), FrozenModel(other)
    pair = tiny.pairs(1)[0]
    found = reference.gradient(model, objective(model, pair, before))
    assert difference(found, reference.gradient(model, (weights * log_p).mean())) < 1e-8
    torch.testing.assert_close(objective.implicit_weights(model, pair, before)["weight"], weights)


def test_wtnpo_tends_to_tnpo_and_tnpo_starts_as_gradient_ascent(model: nn.Module) -> None:
    pair, still = tiny.pairs(1)[0], FrozenModel.copied(model)
    ascent = reference.gradient(model, GradientAscent()(model, pair))
    tnpo = reference.gradient(model, TNPO()(model, pair, still))
    wtnpo = reference.gradient(model, WTNPO(alpha=1e-12)(model, pair, still))
    assert difference(tnpo, ascent) < 1e-12
    assert difference(wtnpo, tnpo) < 1e-10


@pytest.mark.parametrize("objective", [NPO(), TNPO(), WTNPO()], ids=repr)
def test_a_preference_without_a_reference_is_refused(
    objective: Objective, model: nn.Module
) -> None:
    name = type(objective).__name__
    with pytest.raises(ValueError, match=rf"`reference` of {name} should be .* Found None. Pass"):
        objective(model, tiny.pairs(1)[0])


def test_graddiff_adds_the_weighted_retain_risk(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    parts = GradDiff(WeightedGradientAscent(2.0), weight=0.7).components(model, pair)
    assert {name: c.weight for name, c in parts.items()} == {"forget": 1.0, "retain": 0.7}
    total = GradDiff(WeightedGradientAscent(2.0), weight=0.7)(model, pair)
    expected = parts["forget"].loss + 0.7 * parts["retain"].loss
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


OBJECTIVES = [
    GradientAscent(),
    WeightedGradientAscent(1.0),
    TNPO(1.0),
    WTNPO(1.0),
    NPO(0.5),
    GradDiff(),
    GradDiff(NPO(0.5)),
    SimNPO(0.5),
    SimNPO(4.5, 0.3),
    SatImp(0.5, 0.3),
    CEU(0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_padding_and_row_order_change_nothing(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    before = FrozenModel(other)
    plain = {"forget": tiny.batch(0), "retain": tiny.batch(1)}
    padded = {"forget": tiny.batch(0, padding=5), "retain": tiny.batch(1, padding=2)}
    shuffled = {side: {k: v[[2, 0, 1]] for k, v in b.items()} for side, b in plain.items()}
    for changed in (padded, shuffled):
        assert objective(model, changed, before).item() == pytest.approx(
            objective(model, plain, before).item(), rel=1e-10
        )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_descent_on_the_objective_raises_the_forget_risk(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    before = FrozenModel(other)
    pair = tiny.pairs(1)[0]
    moved = copy.deepcopy(model)
    grads = reference.gradient(moved, objective(moved, pair, before))
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= 1e-4 * grads[name]
    assert nll(moved, pair["forget"]) > nll(model, pair["forget"])


@pytest.mark.parametrize(
    "objective", [WeightedGradientAscent(1.0), NPO(1.0), TNPO(), WTNPO(), SimNPO()], ids=repr
)
def test_finite_where_every_probability_underflows(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    before = FrozenModel(other)
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in sharp.parameters():
            parameter *= 60
    loss = objective(sharp, tiny.pairs(1)[0], before)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in reference.gradient(sharp, loss).values())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1.0"])
@pytest.mark.parametrize("make", [lambda x: NPO(beta=x), lambda x: WeightedGradientAscent(alpha=x),
                                  lambda x: GradDiff(weight=x), lambda x: TNPO(beta=x),
                                  lambda x: WTNPO(alpha=x), lambda x: SimNPO(beta=x)])  # fmt: skip
def test_settings_out_of_range_are_refused(make: object, value: object) -> None:
    with pytest.raises(ValueError, match=r"should be a positive number. Found .* Pass"):
        make(value)  # type: ignore[operator]


def test_a_batch_without_labels_is_refused(model: nn.Module) -> None:
    batch = tiny.batch(0)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"should have the key `labels`.* Found .* Add labels"):
        nll(model, batch)


# --- implicit weights


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_implicit_weights_are_those_of_the_gradient(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    before, pair = FrozenModel(other), tiny.pairs(1)[0]
    forget = objective.forget if isinstance(objective, GradDiff) else objective
    found = objective.implicit_weights(model, pair, before)
    samples = reference.token_log_p(model, pair["forget"])
    log_p = torch.cat([torch.stack(sample) for sample in samples])
    torch.testing.assert_close(found["inverse confidence"], 1 / log_p.exp().detach())
    weighed = log_p
    if isinstance(forget, NPO):
        weighed = torch.stack([torch.stack(s).sum() for s in samples])
    elif isinstance(forget, SimNPO):
        weighed = torch.stack([torch.stack(s).mean() for s in samples])
    weights = found.get("weight", torch.ones_like(weighed))
    assert weights.shape == weighed.shape and not weights.requires_grad
    expected = reference.gradient(model, (weights * weighed).mean())
    assert difference(reference.gradient(model, forget(model, pair, before)), expected) < 1e-8


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_implicit_weights_do_not_know_padding(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    before = FrozenModel(other)
    short, long = (
        objective.implicit_weights(model, {"forget": tiny.batch(0, padding=padding)}, before)
        for padding in (0, 7)
    )
    assert short.keys() == long.keys() >= {"inverse confidence"}
    for name, weights in short.items():
        torch.testing.assert_close(long[name], weights)
        assert statistics(long[name]) == pytest.approx(statistics(weights))


def test_mean_inverse_confidence_is_that_of_the_answer_tokens() -> None:
    logits = torch.full((1, 500, 2), 0.1).log()
    logits[..., 1] = torch.tensor(0.9).log()
    ids = torch.zeros(1, 500, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[:, 100:130] = 0
    found = GradientAscent().implicit_weights(
        lambda input_ids: SimpleNamespace(logits=logits),
        {"forget": {"input_ids": ids, "labels": labels}},
    )["inverse confidence"]
    assert len(found) == 30
    assert statistics(found) == pytest.approx((10.0, 10.0, 10.0, 10.0), rel=1e-6)


def test_implicit_weights_cost_no_forward_where_it_is_shared(model: nn.Module) -> None:
    calls = []

    def counted(**inputs: torch.Tensor) -> object:
        calls.append(1)
        return model(**inputs)

    shared, pair = SharedForward(counted), tiny.pairs(1)[0]
    loss = WeightedGradientAscent()(shared, pair)
    WeightedGradientAscent().implicit_weights(shared, pair)
    assert len(calls) == 1 and loss.requires_grad


def test_statistics_of_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 7, generator=draw)
    values = sorted(weights.flatten().tolist())
    found = statistics(weights)
    assert found.mean == pytest.approx(sum(values) / 21)
    assert (found.median, found.p95, found.max) == pytest.approx(
        (values[10], values[19], values[20])
    )
    assert all(value != value for value in statistics(torch.zeros(0)))


# --- SimNPO


def test_the_numbers_of_open_unlearning() -> None:
    """On p = (.9, .5, .2), against a reference of (.8, .7, .6)."""
    model, batch = predicting([[0.9, 0.5, 0.2]])
    before = FrozenModel(predicting([[0.8, 0.7, 0.6]])[0])
    assert nll(model, batch).item() == pytest.approx(2.407946 / 3, abs=1e-6)
    assert nll(before.model, batch).item() == pytest.approx(1.090644 / 3, abs=1e-6)
    expected = {
        SimNPO(beta=4.5): 0.011841,
        NPO(beta=0.1): 12.588993,
        WeightedGradientAscent(alpha=1.0): -0.254429,
        SatImp(): -0.005821,
    }
    for objective, value in expected.items():
        assert objective(model, {"forget": batch}, before).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("delta", "gamma", "value"), [(0.5, 4.5 * 0.5, 0.101363), (0.5 / 4.5, 0.5, 0.019357)]
)
def test_the_margin_of_simnpo_stands_inside_of_the_product(
    delta: float, gamma: float, value: float
) -> None:
    model, batch = predicting([[0.9, 0.5, 0.2]])
    found = SimNPO(beta=4.5, delta=delta)(model, {"forget": batch}).item()
    loss = -sum(math.log(p) for p in (0.9, 0.5, 0.2)) / 3
    outside = 2 / 4.5 * math.log1p(math.exp(gamma - 4.5 * loss))
    assert found == pytest.approx(value, abs=1e-6)
    assert found == pytest.approx(outside, abs=1e-6)


def test_simnpo_tends_to_gradient_ascent_by_samples(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    means = [torch.stack(s).mean() for s in reference.token_log_p(model, pair["forget"])]
    found = reference.gradient(model, SimNPO(beta=1e-9)(model, pair))
    assert difference(found, reference.gradient(model, torch.stack(means).mean())) < 1e-6


def test_a_sample_without_answer_takes_no_part_in_simnpo() -> None:
    model, batch = predicting([[0.9, 0.5, 0.2], []])
    assert SimNPO()(model, {"forget": batch}).item() == pytest.approx(0.011841, abs=1e-6)
    assert len(SimNPO().implicit_weights(model, {"forget": batch})["weight"]) == 1
    assert SimNPO().reductions["forget"].count(tiny.gpt2(), batch) == 1
    assert NPO().reductions["forget"].count(tiny.gpt2(), batch) == 2
    assert GradientAscent().reductions["forget"].count(tiny.gpt2(), batch) == 3


@pytest.mark.parametrize("epsilon", [-1e-5, float("nan")])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="`legacy_eps` of WTNPO should be a positive number"):
        WTNPO(legacy_eps=epsilon)


@pytest.mark.parametrize(("name", "parts"), [("forget", ("npo",)), ("regulariser", (NPO(), None))])
def test_a_part_that_is_no_objective_is_refused(name: str, parts: Any) -> None:
    with pytest.raises(TypeError, match=f"`{name}` of Regularised should be an Objective. Found"):
        Regularised(*parts, *[NPO()] * (2 - len(parts)))


def test_a_margin_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`delta` of SimNPO should be a finite number. Found"):
        SimNPO(delta=float("nan"))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_labels_of_the_question_change_nothing(
    objective: Objective, model: nn.Module, other: nn.Module
) -> None:
    pair = {"forget": tiny.batch(0), "retain": tiny.batch(1)}
    masked = {side: {**b, "labels": b["labels"].clone()} for side, b in pair.items()}
    for batch in masked.values():
        assert (batch["labels"][:, 0] == -100).all()  # predicted from nothing
        batch["labels"][:, 0] = 5
    before = FrozenModel(other)
    assert torch.equal(objective(model, masked, before), objective(model, pair, before))
