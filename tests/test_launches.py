"""How many operations a step launches on a device, and how often it waits for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from geffect import Recorder, Rectifier
from geffect.projection import SAGO
from tests.utils.far_device import Counted, Spread, counting, moved_far

pytest.importorskip("triton")

RECTIFIED: dict[str, tuple[dict[str, Any], int]] = {
    "gradient space": ({}, 4),
    "update space": ({"space": "update"}, 6),
    "coordinates": ({"space": "update", "scope": "coordinate"}, 8),
    "SAGO": ({"rule": SAGO(), "ema": 1.0}, 8),
}
"""Options of a rectifier, and the launches that it may add for each tensor."""


SIZES = (4, 12)
"""Of how many tensors the models are that are compared."""


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


def plain(model: Spread, _: Any, step: int) -> None:
    losses = model.losses(step)
    losses["retain"].backward()
    model.zero_grad()
    (-losses["forget"]).backward()


def added(few: Counted, many: Counted, patch: pytest.MonkeyPatch) -> float:
    """The launches that each tensor adds to those of a plain step."""
    without = [third_step(n, plain, patch).launches.total() for n in SIZES]
    found = [few.launches.total(), many.launches.total()]
    return ((found[1] - without[1]) - (found[0] - without[0])) / (SIZES[1] - SIZES[0])


def test_a_recorded_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tensors in SIZES:
        recorders: list[Recorder] = []

        def backward(model: Spread, _: Any, step: int, kept: list[Recorder] = recorders) -> None:
            if not kept:
                kept.append(Recorder(model, tmp_path / f"{len(model.weights)}.h5"))
            kept[0].backward(objective={"forget": -1.0}, **model.losses(step))

        found.append(third_step(tensors, backward, monkeypatch))
        recorders[0].close()
    assert added(*found, monkeypatch) <= 4
    # The losses together, and all Gram matrices together.
    assert [counted.waits.total() for counted in found] == [2, 2]


@pytest.mark.parametrize("name", RECTIFIED)
def test_a_rectified_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, most = RECTIFIED[name]
    found = []
    for tensors in SIZES:
        rectifiers: list[Rectifier] = []

        def backward(
            model: Spread, optimizer: Any, step: int, kept: list[Rectifier] = rectifiers
        ) -> None:
            if not kept:
                kept.append(Rectifier(model, optimizer=optimizer, **options))
            kept[0].backward(objective={"forget": -1.0}, **model.losses(step))

        found.append(third_step(tensors, backward, monkeypatch))
        report = rectifiers[0].report
        assert report is not None
        assert report.fired == (1.0,)
    assert added(*found, monkeypatch) <= most
    # The losses together, the peak of the retain gradient, and what the rule is asked about.
    assert [counted.waits.total() for counted in found] == [3, 3]
