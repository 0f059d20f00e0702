"""RepSelect's single shot: the one gradient that every step takes, from autograd and its SVD."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.demo.repselect import SingleShot
from geffect.gradients import differentiate
from geffect.layers import trainable
from geffect.projection import Collapse
from tests.utils import tiny
from tests.utils.rectified import losses_of


def naive(model: nn.Module, pair: Any, collapse: Collapse) -> dict[str, Tensor]:
    """-gradient of the forget loss of all MLP matrices, without hard directions, at length 1."""
    mlp = {name: p for name, p in model.named_parameters() if ".mlp." in name}
    losses = losses_of(model, pair)
    of = {
        side: dict(zip(mlp, torch.autograd.grad(losses[side], [*mlp.values()]), strict=True))
        for side in ("forget", "retain")
    }
    found = {}
    for name, g in of["forget"].items():
        U, _, Vh = torch.linalg.svd(of[collapse.source][name], full_matrices=False)
        U, V = U[:, : collapse.k], Vh[: collapse.k].T
        x = -g + g @ V @ V.T
        found[name] = x - U @ (U.T @ x)
    length = torch.stack([x.square().sum() for x in found.values()]).sum().sqrt()
    return {name: x / length for name, x in found.items()}


@pytest.mark.parametrize("source", ["forget", "retain"])
def test_every_step_is_the_collapsed_gradient_of_the_first(source: Any) -> None:
    model = tiny.llama()
    collapse = Collapse(3, "both", source, "hard")
    first, *others = tiny.pairs(3)
    expected = naive(model, first, collapse)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shot = SingleShot(model, collapse, ema=0.5)
    for pair in (first, *others):
        optimizer.zero_grad()
        losses = {"objective": {"forget": -1.0}, **losses_of(model, pair)}
        gradients = differentiate([*trainable(model).values()], losses)
        shot.observe(gradients)
        shot.rectify(gradients)
        optimizer.step()
    assert shot.report is not None and shot.report.fired == (0.0,)
    assert shot.watched["retain_ema"][0] is not None
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        if name in expected:
            torch.testing.assert_close(step, 3 * 0.1 * expected[name], rtol=1e-3, atol=1e-5)
        else:
            assert not step.any()


def test_a_model_without_such_matrices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    x = torch.ones(3)
    losses = {"objective": model(x).sum(), "retain": model(-x).sum()}
    gradients = differentiate([*trainable(model).values()], losses)
    shot = SingleShot(model, Collapse(1), ema=0.5)
    shot.observe(gradients)
    with pytest.raises(ValueError, match=r"should have matrices named like .* Found 4 tensors"):
        shot.rectify(gradients)
