"""DPO against a naive loop, and its identities with NPO and GA."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.objectives import DPO, NPO, FrozenModel, GradDiff, Likelihoods, Reference
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.predictions import predicting
from tests.utils.sides import pair_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny.gpt2(seed=1).eval()


def flat(model: nn.Module, loss: Tensor) -> Tensor:
    return reference.flat(reference.gradient(model, loss))


def sums(model: nn.Module, batch: Any) -> list[Tensor]:
    return [torch.stack(row).sum() for row in reference.token_log_p(model, batch)]


def emptied(pair: dict[str, Any], answer: str) -> dict[str, Any]:
    """The pair without one of its two answers."""
    batch = pair["forget"][answer]
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    return {**pair, "forget": {**pair["forget"], answer: without}}


@pytest.mark.parametrize("beta", [0.05, 1.0, 5.0])
def test_dpo_is_its_formula_and_its_weights_are_those_of_its_gradient(
    beta: float, model: nn.Module, other: nn.Module
) -> None:
    pair, dpo = pair_of(DPO()), DPO(beta)
    answers = pair["forget"]["original"], pair["forget"]["alternate"]
    (lose, win), (lose_o, win_o) = ([sums(m, a) for a in answers] for m in (model, other))
    losses, weighted, weights = [], [], []
    for row in range(3):
        margin = (win[row] - win_o[row].detach()) - (lose[row] - lose_o[row].detach())
        losses.append(-2 / beta * torch.log(1 / (1 + (-beta * margin).exp())))
        weights.append(2 / (1 + (beta * margin.detach()).exp()))
        weighted.append(weights[-1] * (lose[row] - win[row]))
    before = FrozenModel(other)
    loss = dpo(model, pair, before)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    torch.testing.assert_close(flat(model, loss), flat(model, torch.stack(weighted).mean()))
    found = dpo.implicit_weights(model, pair, before)["weight"]
    torch.testing.assert_close(found, torch.stack(weights))


def test_the_number_of_open_unlearning() -> None:
    """p = (.9, .5, .2) and l = 6.214608 of the alternate; before (.8, .7, .6) and 6.032287."""
    model, original = predicting([[0.9, 0.5, 0.2]])
    before = predicting([[0.8, 0.7, 0.6]])[0]
    won, alternate = predicting([[math.exp(-6.214608)]])
    won_before = predicting([[math.exp(-6.032287)]])[0]

    # One model for both: it is told apart by how many tokens it is asked for.
    def either(long: Any, short: Any) -> Any:
        return lambda input_ids: (long if input_ids.shape[1] == 4 else short)(input_ids)

    pair = {"forget": {"original": original, "alternate": alternate}}
    loss = DPO(0.1)(either(model, won), pair, FrozenModel(either(before, won_before)))
    assert loss.item() == pytest.approx(12.760151, abs=1e-6)


def test_npo_is_dpo_with_empty_alternates(model: nn.Module, other: nn.Module) -> None:
    pair, before = emptied(pair_of(DPO()), "alternate"), FrozenModel(other)
    both = [of(0.3)(model, pair, before) for of in (DPO, NPO)]
    assert torch.equal(*both) and torch.equal(*(flat(model, loss) for loss in both))


@pytest.mark.parametrize(("beta", "before", "rel"), [(3.0, None, 1e-9), (1e-7, 1, 1e-5)])
def test_at_the_start_and_for_a_small_beta_it_is_ascent_and_descent_on_sums(
    beta: float, before: int | None, rel: float, model: nn.Module
) -> None:
    known = FrozenModel.copied(model.eval() if before is None else tiny.gpt2(before).eval())
    pair = pair_of(DPO())
    found = flat(model, DPO(beta)(model, pair, known))
    lose, win = (torch.stack(sums(model, pair["forget"][a])) for a in ("original", "alternate"))
    expected = flat(model, (lose - win).mean())
    assert (found - expected).abs().max() <= rel * expected.abs().max()


def test_likelihoods_of_both_answers_are_all_it_asks_for(
    model: nn.Module, other: nn.Module
) -> None:
    pair, before = pair_of(DPO()), FrozenModel(other)
    kept: Reference = Likelihoods(before, [pair["forget"]])
    assert DPO()(model, pair, kept).item() == pytest.approx(DPO()(model, pair, before).item())


def test_a_retain_term_goes_with_it(model: nn.Module) -> None:
    pair, before = pair_of(DPO()), FrozenModel.copied(model.eval())
    parts = GradDiff(DPO()).components(model, pair, before)
    assert [*parts] == ["forget", "retain"]
    assert GradDiff(DPO()).sides == ("forget", "forget.alternate", "retain")


def test_other_rows_than_those_of_the_answers_are_refused(model: nn.Module) -> None:
    pair, one = pair_of(DPO()), pair_of(DPO(), rows=(0,))
    pair["forget"]["alternate"] = one["forget"]["alternate"]
    with pytest.raises(ValueError, match=r"a row for each of `forget`.* Found 1 rows beside 3"):
        DPO()(model, pair, FrozenModel.copied(model.eval()))


def test_a_batch_without_alternates_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`forget.alternate` among them. Found forget, retain"):
        DPO()(model, pair_of(NPO()), FrozenModel.copied(model.eval()))


def test_a_batch_without_answers_to_forget_is_refused_by_its_side(model: nn.Module) -> None:
    pair, before = emptied(pair_of(DPO()), "original"), FrozenModel.copied(model.eval())
    for asked in (DPO(), DPO().implicit_weights):
        with pytest.raises(ValueError, match="`forget` should have an answer token"):
            asked(model, pair, before)
