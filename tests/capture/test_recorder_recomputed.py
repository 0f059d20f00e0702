"""Layers that checkpoint their activations run anew in a backward pass: watched, once no more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geffect import Recorder, Rectifier
from geffect.risk import beside
from tests.utils.trainers import same


class Recomputed(nn.Module):
    """Dropout and what a forward pass moves: running statistics, or a power iteration."""

    def __init__(self, *, reentrant: bool, spectral: bool, keeps_state: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Linear(6, 8)
        first = nn.utils.spectral_norm(first) if spectral else first
        self.inner = nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 1)
        self.how = {"use_reentrant": reentrant, "preserve_rng_state": keeps_state}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x.requires_grad_(), **self.how))


def risk(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def trained(model: nn.Module, path: Path | None, *, rectified: bool, update: bool) -> Any:
    """Three steps of ascent; the states of model and random numbers after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    recorder = None if path is None else Recorder(model, path, update=update)
    rectifier = Rectifier(model) if rectified else None
    for step in range(3):
        losses: dict[str, Any] = {"objective": {"forget": -1.0}, "forget": risk(model, step)}
        with beside(model):
            losses["retain"] = risk(model, 10 + step)
        if recorder is not None:
            with beside(model):
                losses["world"] = risk(model, 20 + step)
            recorder.backward(rectifier=rectifier, **losses)
        elif rectifier is not None:
            rectifier.backward(**losses)
        else:
            (-losses["forget"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return {**model.state_dict(), "random": torch.get_rng_state()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
def test_what_a_pass_runs_anew_leaves_no_trace(
    reentrant: bool, spectral: bool, rectified: bool, tmp_path: Path
) -> None:
    # Half of the cells with the update and half without: any three options meet in every way.
    update = reentrant ^ spectral ^ rectified
    for keeps_state in (True, False):
        how = {"reentrant": reentrant, "spectral": spectral, "keeps_state": keeps_state}
        told = {"rectified": rectified, "update": update}
        plain = trained(Recomputed(**how), None, **told)
        watched = trained(Recomputed(**how), tmp_path / f"{keeps_state}.h5", **told)
        assert same(plain, watched)
