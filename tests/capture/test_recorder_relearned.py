"""The objective's gradient at a relearned copy, recorded and rectified, beside plain autograd."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, Relearned, open_run, relearned
from geffect.analysis import g_effect
from geffect.layers import trainable
from geffect.objectives import SharedForward, WeightedGradientAscent, nll
from tests.utils import shallow as tiny
from tests.utils.interrupts import grads_of, same
from tests.utils.models import bits

FORGET, RETAIN, ALL = tiny.batch(1), tiny.batch(3, rows=4), tiny.batch(4, rows=5)
AT = Relearned(radius=0.1, steps=2)


def flat(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [*trainable(model).values()], allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(trainable(model).values(), found, strict=True)
        ]
    )


def in_grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


def losses(model: Any) -> dict[str, Callable[[], Tensor]]:
    return {"forget": partial(nll, model, FORGET), "retain": partial(nll, model, RETAIN)}


def at_copy(model: nn.Module, loss: Callable[[], Tensor], way: Relearned = AT) -> Tensor:
    """The gradient of a loss where the model has relearned the forget batch."""
    learned = way.loss or partial(nll, model, FORGET)
    with relearned(model, learned, radius=way.radius, steps=way.steps, unit=way.unit):
        return flat(model, loss())


OBJECTIVES: dict[str, Any] = {
    "function": lambda model: partial(WeightedGradientAscent(), model, {"forget": FORGET}),
    "ascent": lambda model: {"forget": -1.0},
    "sum": lambda model: {"forget": -0.5, "retain": 2.0},
}


def expected(model: nn.Module, name: str) -> Tensor:
    objective, of = OBJECTIVES[name](model), losses(model)
    if callable(objective):
        return at_copy(model, objective)
    found = objective["forget"] * at_copy(model, of["forget"])
    return found + objective.get("retain", 0.0) * flat(model, of["retain"]())


@pytest.mark.filterwarnings("ignore:An objective that is taken at a relearned copy")
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_recorded_is_the_objective_at_the_copy(
    name: str, update: bool, tmp_path: Path
) -> None:
    model = tiny.gpt2()
    u, (f, r) = expected(model, name), (flat(model, of()) for of in losses(model).values())
    before = bits(model)
    shared = SharedForward(model)
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        recorder.backward(objective=OBJECTIVES[name](shared), **losses(shared), relearned=AT)
    assert bits(model) == before
    torch.testing.assert_close(in_grad(model), u, rtol=1e-9, atol=1e-12)
    run = open_run(tmp_path / "run.h5")
    sources = torch.stack([u, f, r])
    torch.testing.assert_close(
        torch.tensor(run.gram().sum(1)[0, :3, :3]), sources @ sources.T, rtol=1e-9, atol=1e-9
    )
    assert run.manifest["losses"]["objective"] == "loss"
    assert run.manifest["relearned"] == {
        "source": "objective",
        "radius": 0.1,
        "unit": "theta",
        "steps": 2,
        "relearns": "forget",
        "stays": ["retain"],
    }
    scores = g_effect(run, by="model")["score"]
    assert scores.str.contains("objective at a relearned copy").all()


def test_a_file_of_objectives_at_theta_does_not_say_so(tmp_path: Path) -> None:
    model = tiny.gpt2()
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=OBJECTIVES["function"](model), **losses(model))
    run = open_run(tmp_path / "run.h5")
    assert "relearned" not in run.manifest
    assert not g_effect(run)["score"].str.contains("copy").any()


def test_what_is_relearned_may_be_given() -> None:
    model = tiny.gpt2()
    way = Relearned(radius=0.1, loss=partial(nll, model, ALL))
    objective = OBJECTIVES["function"](model)
    u = at_copy(model, objective, way)
    Rectifier(model, rule=None).backward(
        objective=objective, retain=losses(model)["retain"], relearned=way
    )
    torch.testing.assert_close(in_grad(model), u, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:An objective that is taken at a relearned copy")
@pytest.mark.parametrize("recorded", [False, True])
def test_a_window_is_rectified_against_retain_gradients_at_theta(
    recorded: bool, tmp_path: Path
) -> None:
    model = tiny.gpt2()
    u = expected(model, "ascent")
    r = flat(model, losses(model)["retain"]())
    u, r = 2 * u, 2 * r  # of two micro-batches that are alike
    assert u @ r < 0
    rectifier = Rectifier(model)
    backward: Any = rectifier.backward
    if recorded:
        recorder = Recorder(model, tmp_path / "run.h5")
        backward = partial(recorder.backward, rectifier=rectifier)
    for accumulate in (True, False):
        backward(objective={"forget": -1.0}, **losses(model), relearned=AT, accumulate=accumulate)
    torch.testing.assert_close(in_grad(model), u - (u @ r) / (r @ r) * r, rtol=1e-6, atol=1e-8)
    if recorded:
        recorder.close()
        assert open_run(tmp_path / "run.h5").column("n_micro").tolist() == [2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_a_radius_all_is_as_without_a_copy(name: str, tmp_path: Path) -> None:
    ends = []
    for way in (None, Relearned(radius=0.0), Relearned(radius=1.0, steps=0)):
        model = tiny.llama(dropout=0.3)
        torch.manual_seed(5)
        with Recorder(model, tmp_path / "run.h5", overwrite=True) as recorder:
            recorder.backward(objective=OBJECTIVES[name](model), **losses(model), relearned=way)
        ends.append([*grads_of(model), torch.rand(2)])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_passes_are_counted(scale: float) -> None:
    model, calls = tiny.llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    shared = SharedForward(model)
    Rectifier(model).backward(
        objective=OBJECTIVES["function"](shared), **losses(shared), relearned=AT, scaler=scaler
    )
    assert len(calls) == AT.steps + 2


def test_an_objective_without_a_bound_is_told() -> None:
    model = tiny.gpt2()
    rectifier = Rectifier(model)
    with pytest.warns(UserWarning, match="Found ascent on `forget`.*\\.81.*\\.230"):
        rectifier.backward(objective={"forget": -1.0}, **losses(model), relearned=AT)


def test_what_cannot_be_taken_at_a_copy(tmp_path: Path) -> None:
    model = tiny.gpt2()
    of, objective = losses(model), OBJECTIVES["function"](model)
    before = bits(model)

    def refused(error: type[Exception], says: str, **given: Any) -> None:
        for backward in (Rectifier(model).backward, recorder.backward):
            with pytest.raises(error, match=says):
                backward(**{**of, "objective": objective, "relearned": AT} | given)

    with Recorder(model, tmp_path / "run.h5") as recorder:
        refused(ValueError, "Every loss should be a function", retain=of["retain"]())
        refused(ValueError, "Found a tensor as the loss `forget`", forget=of["forget"]())
        refused(ValueError, "Found no loss named `forget`", forget={"retain": -1.0})
        refused(ValueError, "should have a part that is taken", objective={"retain": 1.0})
        assert bits(model) == before
        recorder.backward(objective=objective, **of, relearned=AT)
        for other in (None, Relearned(radius=0.2)):
            with pytest.raises(ValueError, match="`relearned` should be that of the first step"):
                recorder.backward(objective=objective, **of, relearned=other)
    with (
        Recorder(model, tmp_path / "run.h5", resume=True) as recorder,
        pytest.raises(ValueError, match="`relearned` should be that of the first step"),
    ):
        recorder.backward(objective=objective, **of)
