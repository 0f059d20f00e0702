"""A recorder beside a GradScaler, and one that is given gradients."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.gradients import Gradients, differentiate, separate
from geffect.losses import plan
from geffect.objectives import nll
from tests.utils import shallow as tiny


def losses_of(model: nn.Module, pair: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {side: nll(model, batch) for side, batch in pair.items()}


def train(path: Path, scaler: Any, **options: Any) -> list[Tensor]:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rectifier = Rectifier(model) if options.pop("rectified", False) else None
    with Recorder(model, path, **options) as recorder:
        for pair in tiny.pairs(3):
            optimizer.zero_grad()
            recorder.backward(
                objective={"forget": -1.0},
                scaler=scaler,
                rectifier=rectifier,
                **losses_of(model, pair),
            )
            if scaler is None:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"update": True}, {"rectified": True}], ids=str)
def test_a_scale_multiplies_what_is_left_and_nothing_in_the_record(
    options: dict[str, Any], tmp_path: Path
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = train(tmp_path / "plain.h5", None, **options)
    scaled = train(tmp_path / "scaled.h5", scaler, **options)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    one, other = open_run(tmp_path / "plain.h5"), open_run(tmp_path / "scaled.h5")
    assert one.sources == other.sources
    K, L = np.asarray(one.gram()), np.asarray(other.gram())
    lengths = np.sqrt(np.einsum("spkk->spk", K))
    scale = lengths[..., :, None] * lengths[..., None, :]
    # Sources that a step does not have yet are NaN in both.
    np.testing.assert_allclose(np.nan_to_num((K - L) / (scale + 1e-30)), 0, atol=2e-4)


def test_a_step_that_the_scaler_skips_is_marked(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    train(tmp_path / "run.h5", scaler)
    skipped = open_run(tmp_path / "run.h5").column("skipped")
    assert skipped[0] == 1.0
    assert open_run(tmp_path / "run.h5").sources == ("objective", "forget", "retain")


@pytest.mark.parametrize("options", [{}, {"update": True}], ids=str)
@pytest.mark.parametrize("rectified", [False, True])
def test_gradients_taken_elsewhere_are_recorded_as_those_taken_here(
    rectified: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    ends = []
    for path in (tmp_path / "losses.h5", tmp_path / "gradients.h5"):
        model = tiny.llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        rectifier = Rectifier(model) if rectified else None
        with Recorder(model, path, **options) as recorder:
            for pair in tiny.pairs(2):
                optimizer.zero_grad()
                losses = {
                    "objective": {"objective.forget": 1.0, "retain": 0.5},
                    "objective.forget": -nll(model, pair["forget"]),
                    "retain": nll(model, pair["retain"]),
                }
                if path.stem == "losses":
                    recorder.backward(rectifier=rectifier, **losses)
                else:
                    gradients = differentiate([*model.parameters()], losses)
                    recorder.record(gradients, rectifier=rectifier, n_micro=3)
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))
    first, second = (open_run(tmp_path / f"{name}.h5") for name in ("losses", "gradients"))
    np.testing.assert_array_equal(first.gram(), second.gram())
    assert first.manifest["losses"] == second.manifest["losses"]
    assert list(second.column("n_micro")) == [3.0, 3.0]
    assert second.manifest["losses"]["objective"] == {"objective.forget": 1.0, "retain": 0.5}


def test_scaled_gradients_taken_elsewhere_are_recorded_as_they_are(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    S = 1024.0
    forget, retain = torch.tensor([[-3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    rectifier = Rectifier(model)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.record(
            Gradients(
                [*model.parameters()],
                [],
                {"objective.forget": [S * forget], "retain": [S * retain]},
                {
                    "objective": {"objective.forget": 1 / S},
                    "objective.forget": {"objective.forget": 1 / S},
                    "retain": {"retain": 1 / S},
                },
                {"objective": math.nan, "objective.forget": math.nan, "retain": 1.0},
                scale=S,
            ),
            rectifier=rectifier,
        )
    torch.testing.assert_close(model.weight.grad, S * torch.tensor([[-2.0, 2.0]]))
    run = open_run(tmp_path / "run.h5")
    K = run.gram()[0, 0]
    place = run.index
    assert K[place("objective"), place("objective")] == pytest.approx(10.0)
    assert K[place("objective"), place("retain")] == pytest.approx(-2.0)
    assert rectifier.report is not None
    assert rectifier.report.coefficient == pytest.approx((1.0,))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_sign_of_a_declared_objective_is_kept(scale: float, tmp_path: Path) -> None:
    model = tiny.llama()
    losses = {"objective": {"forget": -2.0}, **losses_of(model, tiny.pairs(1)[0])}
    passes = plan([*model.parameters()], losses, scale=scale)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.record(separate([*model.parameters()], passes))
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["losses"]["objective"] == pytest.approx({"forget": -2.0})
    K = run.gram()[0].sum(axis=0)
    assert K[0, 1] == pytest.approx(-2 * K[1, 1], rel=1e-5)
