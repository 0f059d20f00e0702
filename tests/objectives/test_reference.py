"""References: a frozen copy, what it said, and the base of an adapter where that is as it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geffect.objectives import (
    CATALOGUE,
    NPO,
    REGULARISERS,
    AdapterBase,
    FrozenModel,
    Objective,
    Reference,
    SharedForward,
)
from geffect.objectives.reference import base_changed_by
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import pair_of

BATCH = tiny.batch(3)

COMPARING: dict[str, Objective] = {
    name: objective
    for name, objective in {**CATALOGUE, **REGULARISERS}.items()
    if objective.reference != "none"
}
"""The objectives that ask for a reference."""


def adapted(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model with an adapter that has been trained, and its base."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.3, **options
    )
    model = peft.get_peft_model(tiny.llama(1), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.3)
    return model, tiny.llama(1).eval()


def test_a_frozen_copy_stays_as_the_model_was() -> None:
    model = tiny.gpt2()
    frozen = FrozenModel.copied(model)
    naive = reference.token_log_p(tiny.gpt2(), BATCH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    found = frozen.log_probabilities(BATCH)
    assert not found.requires_grad
    expected = torch.cat([torch.stack(sample) for sample in naive])
    torch.testing.assert_close(found[BATCH["labels"][:, 1:] != -100], expected.detach())
    assert frozen.logits(BATCH).shape == (*BATCH["input_ids"].shape, tiny.VOCABULARY)
    assert len(frozen.hidden_states(BATCH)) == 1 + model.config.n_layer


def test_the_base_of_an_adapter_is_asked_without_a_trace() -> None:
    model, base = adapted()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    before, random = AdapterBase(model.train()), torch.get_rng_state()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert isinstance(before, Reference) and not frozen.requires_grad
    for ask in ("log_probabilities", "logits"):
        found, expected = (getattr(r, ask)(BATCH) for r in (before, FrozenModel(base)))
        torch.testing.assert_close(found, expected)
    for a, b in zip(
        before.hidden_states(BATCH), FrozenModel(base).hidden_states(BATCH), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert not torch.allclose(FrozenModel(model.eval()).logits(BATCH), before.logits(BATCH))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_that_changes_its_base_is_no_reference(options: dict[str, Any]) -> None:
    model, _ = adapted(**options)
    (name,) = options
    with pytest.raises(ValueError, match=rf"leave its base as it was. Found `{name} ="):
        AdapterBase(model)


def test_what_is_not_known_of_an_adapter_is_not_assumed() -> None:
    assert base_changed_by(SimpleNamespace(peft_type="LORA")) is None
    assert "IA3" in str(base_changed_by(SimpleNamespace(peft_type="IA3")))


@pytest.mark.parametrize("given", [None, nn.Identity()], ids=["none", "a model"])
def test_what_is_no_reference_is_one_clear_error(given: Any) -> None:
    with pytest.raises(ValueError, match=r"`reference` of NPO should be .* Found .* Pass Frozen"):
        NPO()(tiny.gpt2(), {"forget": BATCH}, given)


@pytest.mark.parametrize("objective", COMPARING.values(), ids=COMPARING)
def test_the_model_that_is_trained_is_no_reference(objective: Objective) -> None:
    """It would move along: the weights of NPO would stay 1, and KL would keep nothing."""
    model = tiny.gpt2().eval()
    for trained in (model, SharedForward(model)):
        with pytest.raises(ValueError, match=r"Found the model itself, which moves with every"):
            objective(trained, pair_of(objective), FrozenModel(model))


def test_the_base_that_an_adapter_is_put_into_is_no_reference_either() -> None:
    model, _ = adapted()
    with pytest.raises(ValueError, match="Found the model itself"):
        NPO()(model, {"forget": BATCH}, FrozenModel(model.eval().get_base_model()))
    assert NPO()(model, {"forget": BATCH}, AdapterBase(model)).isfinite()


def test_a_model_with_dropout_is_no_reference() -> None:
    with pytest.raises(ValueError, match="in eval mode"):
        FrozenModel(tiny.llama(dropout=0.5).train())


def test_a_model_without_adapters_has_no_base() -> None:
    with pytest.raises(TypeError, match=r"should be a model of peft.* Found `GPT2LMHeadModel`"):
        AdapterBase(tiny.gpt2())
