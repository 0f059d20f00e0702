"""The derivative in forward mode is that of a backward pass, also where gradients are stopped."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from geffect.effects import direction, sample_effects, token_effects
from geffect.effects.differential import differential
from tests.utils import tiny
from tests.utils.effects import gradients, inner, sums_of_log_p, uneven

STOPS = {
    "without gradients": torch.no_grad,
    "set to go without": lambda: torch.set_grad_enabled(False),
    "for inference alone": torch.inference_mode,
}


class Refined(nn.Module):
    """A state that is refined again and again, of which the last time alone has a gradient."""

    def __init__(self, stop: str) -> None:
        super().__init__()
        self.stop, self.gain = stop, nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        with STOPS[self.stop]():
            state = (x * self.gain).tanh()
        return x + (state.clone() * self.gain).tanh()


class Model(nn.Module):
    """A language model around it."""

    def __init__(self, stop: str) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(tiny.VOCABULARY, 6), Refined(stop)
        self.head = nn.Linear(6, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embed(input_ids))))


@pytest.mark.parametrize("stop", STOPS)
def test_what_a_model_computes_without_gradients_stands_still(stop: str) -> None:
    torch.manual_seed(0)
    model, batch = Model(stop).double(), uneven(3)
    along = direction(model, [uneven(1)])
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-9, atol=1e-14)
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(samples, naive, rtol=1e-9, atol=1e-14)


def test_what_is_not_named_stands_still() -> None:
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    value, slope = differential(
        lambda at: at["x"] * at["y"], {"x": x, "y": y}, {"x": torch.tensor(1.0)}
    )
    assert (value.item(), slope.item(), slope.requires_grad) == (15.0, 5.0, False)
