"""RR against a loop, and the layers that it may be asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geffect.objectives import RR, FrozenModel
from tests.utils import reference, tiny


def naive(model: Any, other: Any, batch: reference.Batch, k: int) -> torch.Tensor:
    """The mean of |h_k - h_{o,k}|^2, one answer token at a time."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    now = model(**inputs, output_hidden_states=True).hidden_states[k]
    before = other(**inputs, output_hidden_states=True).hidden_states[k].detach()
    distances = [
        (now[row, position] - before[row, position]).square().sum()
        for row, labels in enumerate(batch["labels"])
        for position, label in enumerate(labels)
        if position > 0 and label != -100
    ]
    return torch.stack(distances).mean()


@pytest.mark.parametrize(("layer", "k"), [(0, 0), (1, 1), (2, 2), (0.4, 1), (0.99, 1), (2.0, 2)])
def test_it_is_its_formula(layer: float, k: int) -> None:
    model, other = tiny.gpt2(), tiny.gpt2(seed=1).eval()
    pair = {"retain": tiny.batch(0, padding=2)}
    loss = RR(layer)(model, pair, FrozenModel(other))
    expected = naive(model, other, pair["retain"], k)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, gradient = reference.gradient(model, loss), reference.gradient(model, expected)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("layer", [-1, 1.5, float("nan"), float("inf"), True, "1", None])
def test_what_is_no_layer_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match="`retain_layer` of RR should be an index of hidden"):
        RR(layer)


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    model = tiny.gpt2()
    with pytest.raises(ValueError, match=r"`retain_layer` should be .* 0 to 2, .* Found 3. Pass"):
        RR(3)(model, {"retain": tiny.batch(0)}, FrozenModel.copied(model))


def test_a_reference_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of the size that the model has. Found 16 beside 12"):
        RR()(tiny.gpt2(), {"retain": tiny.batch(0)}, FrozenModel(tiny.llama().eval()))


def test_a_model_without_hidden_states_is_refused() -> None:
    def model(output_hidden_states: bool = False, **inputs: torch.Tensor) -> object:
        return SimpleNamespace(logits=torch.zeros(3, 9, 4))

    with pytest.raises(ValueError, match=r"should return `.hidden_states` .* none from `function`"):
        RR()(model, {"retain": tiny.batch(0)}, FrozenModel(model))
    with pytest.raises(ValueError, match=r"causal language model .* an encoder-decoder. Choose"):
        RR()(tiny.t5(), {"retain": tiny.translation(0)}, FrozenModel(tiny.t5().eval()))
