"""A derivative in forward mode is that of a backward pass, which leaves something out."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from geffect.effects import sample_effects, token_effects
from geffect.effects.differential import differential
from tests.utils import tiny
from tests.utils.effects import SHAPE, gradients, inner, sums_of_log_p, uneven

PADDING = SHAPE["pad_token_id"]


class Refined(nn.Module):
    """A state that is refined again and again, of which the last time alone has a gradient."""

    def __init__(self, without_gradients: Callable[[], torch.set_grad_enabled]) -> None:
        super().__init__()
        self.without_gradients = without_gradients
        self.embed, self.gain = tokens(), nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        with self.without_gradients():
            state = (x * self.gain).tanh()
        return x + (state.clone() * self.gain).tanh()


class Places(nn.Embedding):
    """Positions, counted from tokens, of which those of padding have a row that is not trained."""

    def forward(self, input_ids: Tensor, padding: int) -> Tensor:
        real = input_ids.ne(padding).long()
        return super().forward(real.cumsum(dim=1) * real)


class Placed(nn.Module):
    """Tokens and their places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = tokens(), Places(16, 6, padding_idx=0)

    def forward(self, input_ids: Tensor) -> Tensor:
        both: Tensor = self.embed(input_ids) + self.places(input_ids, PADDING)
        return both


def tokens(**options: bool | int) -> nn.Embedding:
    return nn.Embedding(tiny.VOCABULARY, 6, **options)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "without gradients": lambda: Refined(torch.no_grad),
    "set to go without": lambda: Refined(lambda: torch.set_grad_enabled(False)),
    "padding": lambda: tokens(padding_idx=PADDING),
    "padding, from the end": lambda: tokens(padding_idx=PADDING - tiny.VOCABULARY),
    "places of what is no padding": Placed,
    "gradients by frequency": lambda: tokens(scale_grad_by_freq=True),
}


class Model(nn.Module):
    """A language model on a body, whose embedding may be its head too."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(6, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(input_ids)))


@pytest.mark.parametrize("body", BODIES)
def test_what_has_no_gradient_stands_still(body: str) -> None:
    torch.manual_seed(0)
    model, batch = Model(BODIES[body]()).double(), uneven(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # of padding too
    along = [torch.randn_like(parameter) for parameter in model.parameters()]
    naive = torch.stack([inner(gradients(model, s), along) for s in sums_of_log_p(model, batch)])
    by_sample = token_effects(model, batch, along).by_sample
    torch.testing.assert_close(by_sample, naive.sum(dim=1), rtol=1e-9, atol=1e-12)
    samples = sample_effects(model, [batch], {"a": along})["a"]
    torch.testing.assert_close(samples, naive, rtol=1e-9, atol=1e-12)


def test_what_is_not_named_stands_still() -> None:
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    value, slope = differential(
        lambda at: at["x"] * at["y"], {"x": x, "y": y}, {"x": torch.tensor(1.0)}
    )
    assert (value.item(), slope.item(), slope.requires_grad) == (15.0, 5.0, False)
