"""Negation of a task vector."""

import copy
import math

import pytest
import torch
from torch import nn

from geffect.edits import TaskVectorNegation
from geffect.edits.base import state_of
from geffect.layers import trainable
from tests.utils import tiny


def tuned_of(model: nn.Module) -> nn.Module:
    """The model after a step of training."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned


@pytest.mark.parametrize("alpha", [1.0, 0.25, -1.0])
def test_the_formula(alpha: float) -> None:
    model = tiny.gpt2()
    tuned = tuned_of(model)
    after = dict(tuned.named_parameters())
    for given in (tuned, tuned.state_dict()):
        found = TaskVectorNegation(alpha).displacement(model, {"tuned": given})
        assert found.keys() == trainable(model).keys()
        for name, parameter in trainable(model).items():
            expected = -alpha * (after[name] - parameter)
            assert torch.allclose(found[name], expected, rtol=1e-12, atol=1e-15)


def test_alpha_zero_is_the_identity_and_what_does_not_move_keeps_its_bits() -> None:
    model = tiny.llama()
    tuned = tuned_of(model)
    assert TaskVectorNegation(0.0).displacement(model, {"tuned": tuned}) == {}
    assert TaskVectorNegation(2.0).displacement(model, {"tuned": copy.deepcopy(model)}) == {}
    with torch.no_grad():
        model.lm_head.weight[0] = -0.0
        tuned.lm_head.weight[0] = 0.0
    with TaskVectorNegation(0.5).change(model, {"tuned": tuned}):
        assert torch.signbit(model.lm_head.weight[0]).all()


def test_subtracted_added_and_taken_back() -> None:
    model = tiny.llama().bfloat16()
    tuned, before = tuned_of(model), copy.deepcopy(model)
    for alpha in (1.0, -1.0):
        change = TaskVectorNegation(alpha).apply(model, {"tuned": tuned})
        assert any(
            not torch.equal(p, q)
            for p, q in zip(model.parameters(), before.parameters(), strict=True)
        )
        change.revert()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p.view(torch.int16), q.view(torch.int16))


def test_what_is_refused() -> None:
    model = tiny.llama()
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError, match="should be a finite number"):
            TaskVectorNegation(odd)
    with pytest.raises(ValueError, match=r"Found nothing. Pass `tuned` as well: a model"):
        TaskVectorNegation().change(model, {})
    with pytest.raises(ValueError, match=r"the model that is edited. Found"):
        TaskVectorNegation().change(model, {"tuned": tiny.gpt2()})
    wider = copy.deepcopy(model)
    wider.lm_head = nn.Linear(16, 40, bias=False)
    with pytest.raises(ValueError, match=r"shape \(40, 16\), not \(23, 16\)"):
        TaskVectorNegation().change(model, {"tuned": wider})


def test_adapters_are_refused_and_named() -> None:
    peft = pytest.importorskip("peft")
    model = tiny.llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match="Merge the adapter into its model first"):
        TaskVectorNegation().change(adapted, {"tuned": adapted})
    # Its base has the names and the weights of the model: no task vector would be found.
    with pytest.raises(ValueError, match="Found adapters beside them"):
        TaskVectorNegation().change(model, {"tuned": adapted})
    assert state_of("tuned", model.state_dict(), model).keys() == trainable(model).keys()


def test_models_that_differ_elsewhere_are_refused() -> None:
    """What has no gradient is not changed, and would be left of the other model in silence."""
    model = tiny.llama()
    tuned = tuned_of(model)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Found that `lm_head.weight` differs"):
        TaskVectorNegation().change(model, {"tuned": tuned})
    with torch.no_grad():
        tuned.lm_head.weight.copy_(model.lm_head.weight)
    assert "lm_head.weight" not in TaskVectorNegation().displacement(model, {"tuned": tuned})


def test_models_with_more_tensors_are_refused() -> None:
    """More layers, or a head apart from an embedding that is tied here, would be left out."""
    model = tiny.llama()
    deeper = copy.deepcopy(model)
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    with pytest.raises(ValueError, match=r"Found 9 tensors beside them"):
        TaskVectorNegation().change(model, {"tuned": deeper})
    with pytest.raises(ValueError, match=r"`lm_head.weight` apart from `model.embed_tokens"):
        TaskVectorNegation().change(tiny.llama(tied=True), {"tuned": tiny.llama(1)})
    assert TaskVectorNegation().change(model, {"tuned": tiny.llama(1, tied=True)}).touched
    with pytest.raises(TypeError, match=r"a model, or its tensors by name. Found `str`"):
        TaskVectorNegation().change(model, {"tuned": "folder"})
