"""The source `rectified`: what a rectifier hands to the optimizer, beside what it was made from."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Recorder, Rectifier, open_run
from geffect.projection import SAGO, nearest
from tests.utils import shallow as tiny
from tests.utils.rectified import Scaler, losses_of, placed
from tests.utils.trainers import same

GA = {"forget": -1.0}
WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "model": ({}, GA),
    "layer": ({"scope": "layer"}, GA),
    "coordinate": ({"scope": "coordinate"}, GA),
    "select": ({"select": 0.1}, GA),
    "selection alone": ({"rule": None, "select": 0.1}, GA),
    "sago": ({"rule": SAGO()}, GA),
    "forget part": ({"part": "forget"}, {"forget": -1.0, "retain": 0.5}),
    "a tensor": ({}, None),
}


def trained(
    path: Path | None,
    rectifier: dict[str, Any],
    objective: Any,
    *,
    update: bool = False,
    micro: int = 1,
    scale: float | None = None,
    seen: Callable[[nn.Module, Rectifier], None] = lambda *_: None,
    **told: Any,
) -> tuple[Any, Any]:
    """The states of model and optimizer after three rectified steps that are clipped."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = Rectifier(model, ema=0.5, **rectifier)
    recorder = None if path is None else Recorder(model, path, update=update, **told)
    whose: Any = made if recorder is None else recorder
    by = {} if recorder is None else {"rectifier": made}
    scaler = {} if scale is None else {"scaler": Scaler(scale)}
    pairs = iter(tiny.pairs(3 * micro))
    for _ in range(3):
        for left in reversed(range(micro)):
            losses = losses_of(model, next(pairs))
            objective_of_step = objective or -1.0 * losses["forget"].square()
            whose.backward(
                objective=objective_of_step, accumulate=left > 0, **by, **scaler, **losses
            )
        seen(model, made)
        for parameter in model.parameters():
            if scale is not None and parameter.grad is not None:
                parameter.grad /= scale
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    return model.state_dict(), optimizer.state_dict()


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([t.detach().double().flatten() for t in tensors]).numpy()


@cache
def unwatched(way: str) -> tuple[Any, Any]:
    return trained(None, *WAYS[way])


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_handed_on_is_a_source_and_training_ends_as_unwatched(
    way: str, update: bool, tmp_path: Path
) -> None:
    left: list[np.ndarray] = []
    averages: list[np.ndarray] = []

    def look(model: nn.Module, rectifier: Rectifier) -> None:
        left.append(flat(p.grad for p in model.parameters()))
        averages.append(flat(t for t in rectifier.watched["retain_ema"] if t is not None))

    options, objective = WAYS[way]
    watched = trained(tmp_path / "run.h5", options, objective, update=update, seen=look)
    assert same(watched, unwatched(way))
    run = open_run(tmp_path / "run.h5")
    assert run.sources[-2 if update else -1] == "rectified"
    K = run.gram().sum(axis=1)
    x, r, u = (run.index(name) for name in ("rectified", "retain_ema", "objective"))
    for step, (found, average) in enumerate(zip(left, averages, strict=True)):
        assert K[step, x, x] == pytest.approx(found @ found, rel=1e-12)
        scale = np.linalg.norm(found) * np.linalg.norm(average)
        assert K[step, x, r] == pytest.approx(found @ average, abs=1e-12 * scale)
    if way not in ("select", "selection alone"):
        assert (K[:, x, r] >= -1e-6 * np.sqrt(K[:, x, x] * K[:, r, r])).all()
    assert (np.abs(K[:, x, x] - K[:, u, u]) > 1e-5 * K[:, u, u]).any()


@pytest.mark.parametrize("objective", [GA, None])
def test_micro_batches_and_a_loss_scale_leave_it_as_it_is(objective: Any, tmp_path: Path) -> None:
    for name, how in {"one": {}, "scaled": {"scale": 64.0}}.items():
        trained(tmp_path / name, {}, objective, micro=2, **how)
    one, scaled = (open_run(tmp_path / name) for name in ("one", "scaled"))
    assert one.sources == scaled.sources and "rectified" in one.sources
    np.testing.assert_allclose(one.gram(), scaled.gram(), rtol=1e-5, atol=1e-12)


def test_it_is_absent_where_no_gradient_is_rectified(tmp_path: Path) -> None:
    for name, options in {"update": {"space": "update"}, "watching": {"rule": None}}.items():
        model = tiny.llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        options = {**options, **placed(options.get("space", "gradient"), optimizer)}
        rectifier = Rectifier(model, **options)
        with Recorder(model, tmp_path / name, update=True) as recorder:
            losses = losses_of(model, tiny.pairs(1)[0])
            recorder.backward(objective=GA, rectifier=rectifier, **losses)
            optimizer.step()
        assert open_run(tmp_path / name).sources == (
            "objective", "forget", "retain", "retain_ema", "update",
        )  # fmt: skip


def test_several_retain_sets_and_what_is_stored(tmp_path: Path) -> None:
    model, kept = tiny.llama(), []
    rectifier = Rectifier(model, nearest, protect=("retain", "world"))
    first, second = tiny.pairs(2)
    losses = {**losses_of(model, first), "world": losses_of(model, second)["retain"]}
    with Recorder(model, tmp_path / "run.h5", store="full") as recorder:
        recorder.backward(objective=GA, rectifier=rectifier, **losses)
        kept = [p.grad.clone() for p in model.parameters()]
    run = open_run(tmp_path / "run.h5")
    assert run.sources[-3:] == ("retain_ema", "world_ema", "rectified")
    found = np.concatenate([layer.ravel() for layer in run.gradient("rectified", 0)])
    np.testing.assert_array_equal(np.sort(found), np.sort(flat(kept)))


def test_a_loss_cannot_have_its_name(tmp_path: Path) -> None:
    model = tiny.llama()
    losses = losses_of(model, tiny.pairs(1)[0])
    taken = pytest.raises(ValueError, match="none named `rectified` or `update`")
    with Recorder(model, tmp_path / "run.h5") as recorder, taken:
        recorder.backward(objective=GA, rectified=losses["retain"], **losses)
