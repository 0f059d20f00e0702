"""PO: what is learned, and what is recorded of what is forgotten."""

import torch

from geffect.objectives import PO, GradDiff, as_objective
from geffect.objectives.base import step_losses
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import pair_of


def test_po_is_the_risk_of_the_alternates_and_no_other() -> None:
    model, pair = tiny.gpt2(), pair_of(PO())
    loss = PO()(model, pair)
    assert torch.equal(loss, as_objective({"forget.alternate": 1.0})(model, pair))
    torch.testing.assert_close(loss, reference.nll(model, pair["forget"]["alternate"]))
    losses = step_losses(PO().components(model, pair), apart=False)
    assert [*losses] == ["objective", "forget.alternate"]
    assert losses["objective"] == {"forget.alternate": 1.0}


def test_a_retain_term_goes_with_it() -> None:
    model, pair = tiny.gpt2(), pair_of(PO())
    expected = reference.nll(model, pair["forget"]["alternate"])
    expected = expected + 0.5 * reference.nll(model, pair["retain"])
    torch.testing.assert_close(GradDiff(PO(), weight=0.5)(model, pair), expected)
    assert GradDiff(PO(), weight=0.5).risks == {"forget.alternate": 1.0, "retain": 0.5}
