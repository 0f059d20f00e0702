"""Controls of gradient ascent, against naive loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.objectives import (
    CappedAscent,
    FrozenModel,
    GradientAscent,
    LikelihoodControl,
    LowestLossAscent,
    TemperedAscent,
    named,
)
from geffect.objectives.base import Reduction, share_of
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import pair_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


def same(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = [reference.flat(reference.gradient(model, loss)) for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


PAIR = pair_of(GradientAscent(), rows=(0, 1, 2, 3))


def summed(model: nn.Module) -> list[Tensor]:
    return [-torch.stack(row).sum() for row in reference.token_log_p(model, PAIR["forget"])]


def middle(values: list[Tensor]) -> float:
    """A bound that parts them, and is none of them."""
    first, second = sorted(float(value) for value in values)[1:3]
    return (first + second) / 2


@pytest.mark.parametrize("legacy", [False, True])
def test_likelihood_control_against_a_loop(model: nn.Module, legacy: bool) -> None:
    losses = summed(model)
    delta = middle(losses)
    likely = [loss for loss in losses if loss < delta]
    assert 0 < len(likely) < len(losses)
    total = torch.stack([delta - loss for loss in likely]).sum()
    expected = total / (len(likely) if legacy else len(losses))
    objective = LikelihoodControl(delta, legacy)
    same(model, objective(model, PAIR), expected)
    weights = objective.implicit_weights(model, PAIR)["weight"]
    assert weights.tolist() == [float(loss < delta) for loss in losses]


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_unlikely_already_stays(model: nn.Module, legacy: bool) -> None:
    loss = LikelihoodControl(1e-3, legacy)(model, PAIR)
    assert loss.item() == 0 and not reference.flat(reference.gradient(model, loss)).any()


def test_without_a_bound_likelihood_control_is_ascent_on_whole_answers(model: nn.Module) -> None:
    found = reference.gradient(model, LikelihoodControl(1e6)(model, PAIR))
    expected = reference.gradient(model, -torch.stack(summed(model)).mean())
    torch.testing.assert_close(*map(reference.flat, (found, expected)), rtol=1e-8, atol=1e-10)


def test_capped_ascent_against_a_loop(model: nn.Module) -> None:
    log_p = torch.cat([torch.stack(row) for row in reference.token_log_p(model, PAIR["forget"])])
    cap = -float(log_p.median()) - 1e-9  # parts them
    likely = [token for token in log_p if token >= -cap]
    assert 0 < len(likely) < len(log_p)
    expected = (torch.stack(likely).sum() - cap * (len(log_p) - len(likely))) / len(log_p)
    objective = CappedAscent(cap)
    same(model, objective(model, PAIR), expected)
    weights = objective.implicit_weights(model, PAIR)["weight"]
    assert weights.tolist() == [float(token >= -cap) for token in log_p]


def test_a_token_beyond_the_cap_is_left_alone(model: nn.Module) -> None:
    """Also one of likelihood zero: no NaN of 0 times infinity."""

    def said(**inputs: Tensor) -> Any:
        found = model(**inputs)
        impossible = torch.zeros(found.logits.shape[-1], dtype=torch.bool)
        impossible[PAIR["forget"]["labels"].max()] = True
        found.logits = found.logits.masked_fill(impossible, -torch.inf)
        return found

    loss = CappedAscent(1e-3)(said, PAIR)
    assert loss.item() == pytest.approx(-1e-3)
    assert not reference.flat(reference.gradient(model, loss)).any()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_tempered_ascent_against_a_loop(model: nn.Module, temperature: float) -> None:
    batch = PAIR["forget"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.stack([
        torch.log_softmax(logits[row, place - 1] / temperature, -1)[label]
        for row, labels in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels) if place and label != -100
    ]).mean()  # fmt: skip
    same(model, TemperedAscent(temperature)(model, PAIR), expected)
    assert set(TemperedAscent(temperature).implicit_weights(model, PAIR)) == {"inverse confidence"}


def lowest(model: nn.Module, fraction: float) -> list[Tensor]:
    chosen = []
    for row in reference.token_log_p(model, PAIR["forget"]):
        likeliest = sorted(row, key=lambda log_p: -float(log_p))
        chosen += likeliest[: max(1, math.floor(round(fraction * len(row), 9)))]
    return chosen


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 1.0])
def test_lowest_loss_ascent_against_a_loop(model: nn.Module, fraction: float) -> None:
    objective, chosen = LowestLossAscent(fraction), lowest(model, fraction)
    same(model, objective(model, PAIR), torch.stack(chosen).mean())
    weights = objective.implicit_weights(model, PAIR)["weight"]
    assert weights.sum() == len(chosen) and set(weights.tolist()) <= {0.0, 1.0}
    assert objective.reductions["forget"].count(model, PAIR["forget"]) == len(chosen)


@pytest.mark.parametrize(
    "objective", [TemperedAscent(1.0), LowestLossAscent(1.0), CappedAscent(1e3)], ids=repr
)
def test_at_one_or_without_a_cap_it_is_gradient_ascent(model: nn.Module, objective: Any) -> None:
    same(model, objective(model, PAIR), GradientAscent()(model, PAIR))


@pytest.mark.parametrize("name", ["likelihood-control", "ga-capped", "ga-temperature", "ga-lowest"])
def test_controls_go_with_kl(model: nn.Module, name: str) -> None:
    before = FrozenModel(tiny.gpt2(seed=1).eval())
    both = named(f"{name}+kl", {"weight": 5.0})
    alone, kl = named(name)(model, PAIR), named("ga+kl")(model, PAIR, before)
    expected = alone + 5 * (kl - GradientAscent()(model, PAIR))
    assert both(model, PAIR, before).item() == pytest.approx(expected.item(), rel=1e-10)


def test_of_equal_tokens_the_first_count() -> None:
    log_p = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 0.0]])
    scored = torch.tensor([[True, True, True, True, False]])
    assert LowestLossAscent(0.5).weights(log_p, scored).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 100), (0.7, 10), (0.8, 5), (0.1, 30)])
def test_a_share_is_that_of_decimal_numbers(fraction: float, count: int) -> None:
    assert share_of(torch.tensor([count]), fraction).item() == round(100 * fraction) * count // 100


def test_packed_rows_are_refused() -> None:
    ids = torch.tensor([[3, 5, 6, 3, 5, 7]])
    labels = torch.tensor([[-100, 5, 6, -100, 5, 7]])
    packed = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2] * 2])}
    for objective in (LikelihoodControl(), LowestLossAscent()):
        with pytest.raises(ValueError, match="one answer a row"):
            objective(tiny.gpt2(), {"forget": packed})
    with pytest.raises(ValueError, match="one answer a row"):
        Reduction("forget", "token_mean", fraction=0.5).count(tiny.gpt2(), packed)


def test_an_answer_that_is_ruled_out_is_no_nan() -> None:
    def certain(input_ids: Tensor) -> Any:
        logits = torch.full((*input_ids.shape, 8), -torch.inf, requires_grad=True)
        return type("Output", (), {"logits": logits.index_fill(-1, torch.tensor([0]), 0.0)})

    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    assert LikelihoodControl()(certain, {"forget": batch}).item() == 0


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: LikelihoodControl(0.0), "`delta` of LikelihoodControl should be a positive"),
        (lambda: LikelihoodControl(2.0, 1), "`legacy` of LikelihoodControl should be True or"),
        (lambda: TemperedAscent(-1.0), "`temperature` of TemperedAscent should be a positive"),
        (lambda: LowestLossAscent(0.0), "`fraction` of LowestLossAscent should be a positive"),
        (lambda: LowestLossAscent(1.5), "`fraction` of LowestLossAscent should be at most 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{says}.* Found "):
        made()
