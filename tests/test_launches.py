"""How many operations a step launches on a device, and how often it waits for it."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from geffect import Recorder, Rectifier, open_run
from geffect.losses import NotFinite
from geffect.projection import SAGO
from tests.utils.far_device import Counted, Spread, counting, moved_far

pytest.importorskip("triton")

RECTIFIED: dict[str, tuple[dict[str, Any], int]] = {
    "gradient space": ({}, 4),
    "update space": ({"space": "update"}, 6),
    "coordinates": ({"space": "update", "scope": "coordinate"}, 8),
    "SAGO": ({"rule": SAGO(), "ema": 1.0}, 8),
    "select": ({"select": 0.1}, 10),
    "select, update space": ({"select": 0.1, "space": "update"}, 10),
}
"""Options of a rectifier, and the launches that it may add for each tensor."""


SIZES = (2, 6)
"""Of how many tensors the models are that are compared."""


KINDS = ("tensors", "functions")
"""What losses are given as."""


def given(model: Spread, step: int, kind: str) -> dict[str, Any]:
    """The losses of a step."""
    if kind == "tensors":
        return dict(model.losses(step))
    return {side: lambda side=side: model.losses(step)[side] for side in ("forget", "retain")}


def third_step(
    tensors: int, backward: Callable[[Spread, Any, int], None], patch: pytest.MonkeyPatch
) -> Counted:
    """What the third step launches."""
    model = Spread(tensors)
    moved_far(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        with counting(patch) as counted:
            backward(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
    return counted


def plain(kind: str) -> Callable[[Spread, Any, int], None]:
    """A step of the same passes, with nothing beside them."""

    def backward(model: Spread, _: Any, step: int) -> None:
        losses = given(model, step, kind)
        for side, sign in (("retain", 1.0), ("forget", -1.0)):
            model.zero_grad()
            loss = losses[side] if kind == "tensors" else losses[side]()
            (sign * loss).backward()

    return backward


@cache
def launches(tensors: int, kind: str) -> int:
    """Of a plain step."""
    with pytest.MonkeyPatch.context() as patch:
        return third_step(tensors, plain(kind), patch).launches.total()


def added(few: Counted, many: Counted, kind: str) -> float:
    """The launches that each tensor adds to those of a plain step."""
    without = [launches(n, kind) for n in SIZES]
    found = [few.launches.total(), many.launches.total()]
    return ((found[1] - without[1]) - (found[0] - without[0])) / (SIZES[1] - SIZES[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tensors in SIZES:
        recorders: list[Recorder] = []

        def backward(model: Spread, _: Any, step: int, kept: list[Recorder] = recorders) -> None:
            if not kept:
                kept.append(Recorder(model, tmp_path / f"{len(model.weights)}.h5"))
            kept[0].backward(objective={"forget": -1.0}, **given(model, step, kind))

        found.append(third_step(tensors, backward, monkeypatch))
        recorders[0].close()
    assert added(*found, kind) <= 4
    # The losses together, and all Gram matrices together.
    assert [counted.waits.total() for counted in found] == [2, 2]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "tensors") for name in RECTIFIED), ("gradient space", "functions")],
)
def test_a_rectified_step(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, most = RECTIFIED[name]
    found = []
    for tensors in SIZES:
        rectifiers: list[Rectifier] = []

        def backward(
            model: Spread, optimizer: Any, step: int, kept: list[Rectifier] = rectifiers
        ) -> None:
            if not kept:
                kept.append(Rectifier(model, optimizer=optimizer, **options))
            kept[0].backward(objective={"forget": -1.0}, **given(model, step, kind))

        found.append(third_step(tensors, backward, monkeypatch))
        report = rectifiers[0].report
        assert report is not None
        assert report.fired == (1.0,)
    assert added(*found, kind) <= most
    # The losses with the peak of the retain gradient, and what the rule is asked about.
    assert [counted.waits.total() for counted in found] == [2, 2]


def averages(rectifier: Rectifier) -> list[Any]:
    """What a rectifier remembers."""
    (average,) = rectifier.watched.values()
    return [None if tensor is None else tensor.tolist() for tensor in average]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("by", ["recorder", "rectifier", "both"])
def test_a_loss_of_a_device_that_is_not_finite_leaves_nothing(
    by: str, side: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Spread(2)
    moved_far(model)
    rectifier, path = Rectifier(model), tmp_path / "run.h5"
    with counting(monkeypatch), Recorder(model, path) as recorder:

        def backward(**losses: Any) -> None:
            losses["objective"] = {"forget": -1.0}
            if by == "rectifier":
                rectifier.backward(**losses)
            else:
                recorder.backward(**losses, rectifier=rectifier if by == "both" else None)

        backward(**given(model, 0, kind))
        model.zero_grad()
        before = averages(rectifier)
        broken = {name: loss * math.inf for name, loss in model.losses(1).items() if name == side}
        losses = given(model, 1, kind)
        losses[side] = broken[side] if kind == "tensors" else lambda: broken[side]
        with pytest.raises(NotFinite, match=f"Loss `{side}` should be finite. Found inf"):
            backward(**losses)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert averages(rectifier) == before
    if by != "rectifier":
        assert len(open_run(path).steps) == 1
