"""Closed-form edits: at a minimum, by autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.edits import ClosedFormLinear, derived_input, layer_inputs
from geffect.layers import trainable
from tests.utils import tiny

LAYER = "model.layers.1.mlp.down_proj.weight"


def inputs(seed: int, count: int = 5, width: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("e", "l1", "l2"), [(1.0, 0.1, 0.1), (2.0, 0.0, 1e-3), (0.0, 1.0, 1.0)])
def test_the_gradient_of_the_objective_is_zero(e: float, l1: float, l2: float) -> None:
    model = tiny.llama().double()
    old = trainable(model)[LAYER].detach().clone()
    data = {"erased": inputs(1), "targets": inputs(2), "preserved": inputs(3, 9)}
    change = ClosedFormLinear(LAYER, e, l1, l2).change(model, data)
    assert list(change.displacement) == [LAYER]
    with change:
        new = trainable(model)[LAYER].detach().clone().requires_grad_()
    loss = l2 * (new - old).square().sum()
    for c, target in zip(data["erased"], data["targets"], strict=True):
        loss = loss + e * (new @ c - old @ target).square().sum()
    for c in data["preserved"]:
        loss = loss + l1 * (new @ c - old @ c).square().sum()
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.abs().max() < 1e-10
    assert (change.displacement[LAYER].abs().max().item() < 1e-10) is (e == 0)
    assert torch.equal(trainable(model)[LAYER], old)


def test_the_derived_input_is_a_minimum_and_erasing_it_helps() -> None:
    w = [inputs(4, 7), inputs(5, 3)]
    v = [x + 0.3 * inputs(6 + i, len(x)) for i, x in enumerate(w)]
    concept = inputs(9, 1)[0]
    found = derived_input(w, v, concept, ridge=0.01).requires_grad_()
    terms = [(b @ found - a @ concept).square().sum() for a, b in zip(w, v, strict=True)]
    (gradient,) = torch.autograd.grad(sum(terms[1:], terms[0]) + 0.01 * found.square().sum(), found)
    assert gradient.abs().max() < 1e-10

    model = nn.Sequential(nn.Linear(24, 8, bias=False)).double()
    old = model[0].weight.detach().clone()
    target = inputs(12, 1)
    edit = ClosedFormLinear("0.weight", stay=1e-3)

    def regenerated(erased: Tensor) -> float:
        data = {"erased": erased, "targets": target.expand(len(erased), -1)}
        with edit.change(model, data):
            again = derived_input([old], [model[0].weight], concept, ridge=1e-2)
            return (model[0].weight.detach() @ again - old @ concept).norm().item()

    with edit.change(model, {"erased": concept[None], "targets": target}):
        first = derived_input([old], [model[0].weight], concept, ridge=1e-2)
    assert regenerated(torch.stack([concept, first])) > regenerated(concept[None])


def test_inputs_of_a_layer() -> None:
    model = tiny.llama().train()
    batches = [tiny.batch(1), tiny.batch(2, rows=2, padding=3)]
    found = layer_inputs(model, LAYER, batches)
    assert model.training and not model.model.layers[1].mlp.down_proj._forward_pre_hooks
    expected: list[Tensor] = []
    for batch in batches:
        own: list[Any] = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, given, own=own: own.append(given[0].detach())
        )
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        expected += [
            own[0][row, position - 1]
            for row, labels in enumerate(batch["labels"])
            for position, label in enumerate(labels)
            if position and label != -100
        ]
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    data = {"erased": found[:4], "targets": found[4:8], "preserved": found[8:]}
    assert ClosedFormLinear(LAYER).change(model, data).touched[LAYER]


def test_what_is_refused() -> None:
    model = tiny.llama()
    good = {"erased": inputs(1), "targets": inputs(2)}
    for layer in ("model.norm.weight", "nothing"):
        with pytest.raises(ValueError, match="the weight of a linear layer"):
            ClosedFormLinear(layer).change(model, good)
    for name, bad in (("erased", inputs(1, width=3)), ("targets", None), ("preserved", [1.0])):
        with pytest.raises(ValueError, match=f"`{name}` should be inputs of the layer"):
            ClosedFormLinear(LAYER).change(model, {**good, name: bad})
    for erased in (inputs(1, 0), inputs(1, 2)):
        with pytest.raises(ValueError, match=r"a row for each of `erased`"):
            ClosedFormLinear(LAYER).change(model, {**good, "erased": erased})
    for options in ({"stay": 0.0}, {"erase": -1.0}, {"preserve": math.nan}):
        with pytest.raises(ValueError, match="of ClosedFormLinear should be"):
            ClosedFormLinear(LAYER, **options)
    with pytest.raises(ValueError, match=r"the weight of an nn.Linear"):
        layer_inputs(model, "model.embed_tokens.weight", tiny.batch(1))
    with pytest.raises(ValueError, match="a weight for each"):
        derived_input([], [], torch.ones(2))
    with pytest.raises(ValueError, match="`ridge` should be positive"):
        derived_input([torch.eye(2)], [torch.eye(2)], torch.ones(2), ridge=0.0)


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (tiny.gpt2, "transformer.h.0.attn.c_proj.weight"),  # square, with its input side first
        (tiny.gpt2, "transformer.wpe.weight"),
        (tiny.llama, "model.embed_tokens.weight"),
    ],
)
def test_matrices_that_are_no_linear_layer_are_refused(make: Any, layer: str) -> None:
    width = trainable(make())[layer].shape[1]
    data = {"erased": inputs(1, width=width), "targets": inputs(2, width=width)}
    with pytest.raises(ValueError, match="should be the weight of a linear layer"):
        ClosedFormLinear(layer).change(make(), data)


def test_a_head_that_is_an_embedding_too_is_refused() -> None:
    data = {"erased": inputs(1), "targets": inputs(2)}
    with pytest.raises(ValueError, match=r"one of `model.embed_tokens`, `lm_head`"):
        ClosedFormLinear("model.embed_tokens.weight").change(tiny.llama(tied=True), data)
