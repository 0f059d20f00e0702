"""SatImp against a naive loop, and where it is GA and WGA."""

import pytest
import torch
from torch import nn

from geffect.objectives import GradientAscent, Objective, SatImp, WeightedGradientAscent
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import pair_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (0.5, 3.0), (0.0, 0.2)])
def test_satimp_weighs_tokens_by_its_formula(beta1: float, beta2: float, model: nn.Module) -> None:
    pair, objective = pair_of(SatImp(), padding=2), SatImp(beta1, beta2)
    log_p = torch.cat([torch.stack(r) for r in reference.token_log_p(model, pair["forget"])])
    p = log_p.exp().detach()
    weights = p**beta1 * (1 - p) ** beta2
    loss = objective(model, pair)
    assert loss.item() == pytest.approx((weights * log_p).mean().item(), rel=1e-10)
    found, naive = (
        reference.flat(reference.gradient(model, x)) for x in (loss, (weights * log_p).mean())
    )
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(objective.implicit_weights(model, pair)["weight"], weights)


@pytest.mark.parametrize(
    ("satimp", "same"),
    [(SatImp(0.0, 0.0), GradientAscent()), (SatImp(2.0, 0.0), WeightedGradientAscent(2.0))],
)
def test_satimp_without_importance_is_wga_and_without_both_ga(
    satimp: SatImp, same: Objective, model: nn.Module
) -> None:
    pair = pair_of(satimp)
    both = [objective(model, pair) for objective in (satimp, same)]
    assert both[0].item() == pytest.approx(both[1].item(), rel=1e-12)
    found, expected = (reference.flat(reference.gradient(model, loss)) for loss in both)
    torch.testing.assert_close(found, expected)


def test_a_certain_token_weighs_nothing_unless_importance_is_left_out() -> None:
    log_p = torch.tensor([0.0, -1e-30, -200.0])
    assert SatImp().weights(log_p).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-29)
    assert SatImp(0.0, 0.0).weights(log_p).tolist() == [1.0, 1.0, 1.0]
    assert SatImp(0.0, 1.0).weights(torch.tensor([-1e-10])).item() == pytest.approx(1e-10)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("option", ["beta1", "beta2"])
def test_powers_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{option}` of SatImp should be a number of 0 or more"):
        SatImp(**{option: value})  # type: ignore[arg-type]
