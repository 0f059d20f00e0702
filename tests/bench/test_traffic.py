"""The list of passes over memory is what the kernels of a step read and write."""

from pathlib import Path
from typing import Any

import pytest
import torch

from geffect import Recorder, Rectifier
from geffect.projection import SAGO, orthogonal, selection
from tests.bench.traffic import STEPS, table
from tests.utils.far_device import Counted, Spread, counting, moved_far

pytest.importorskip("triton")

OPTIONS: dict[str, dict[str, Any]] = {
    "rectifier, gradient space": {"rule": orthogonal},
    "rectifier, update space": {"rule": orthogonal, "space": "update"},
    "rectifier, coordinate scope": {"scope": "coordinate", "space": "update"},
    "rectifier, SAGO": {"rule": SAGO(), "ema": 1.0},
    "rectifier, select": {"rule": orthogonal, "select": 0.1},
}
SIDE = 48  # large enough for the matrices of products to be nothing beside the parameters


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return third_step("plain", tmp_path_factory.mktemp("plain"))


def third_step(name: str, folder: Path) -> Counted:
    """What the third step moves."""
    model = moved_far(Spread(2, side=SIDE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, folder / "run.h5")
    rectifier = Rectifier(model, optimizer=optimizer, **OPTIONS[name]) if name in OPTIONS else None
    with pytest.MonkeyPatch.context() as patch, recorder:
        patch.setattr(selection, "SAMPLE", 16)  # as small beside the model as it is elsewhere
        for step in range(3):
            losses = model.losses(step)
            with counting(patch) as counted:
                if name == "plain":
                    losses["retain"].backward()
                    model.zero_grad()
                    (-losses["forget"]).backward()
                else:
                    (rectifier or recorder).backward(objective={"forget": -1.0}, **losses)
                optimizer.step()
                optimizer.zero_grad()
    return counted


@pytest.mark.parametrize("name", STEPS)
def test_each_pass_is_in_the_list(name: str, plain: Counted, tmp_path: Path) -> None:
    found = third_step(name, tmp_path)
    numbers = 4 * 2 * SIDE**2  # bytes of a pass over the parameters
    step = STEPS[name]
    read = (found.read.total() - plain.read.total()) / numbers
    written = (found.written.total() - plain.written.total()) / numbers
    assert (read, written) == (
        pytest.approx(step.read, abs=0.1),
        pytest.approx(step.written, abs=0.1),
    )
    assert step.floor <= step.read + step.written


def test_the_page_on_costs_shows_the_list() -> None:
    page = Path(__file__).parents[2] / "docs" / "costs.md"
    assert table() in page.read_text(encoding="utf-8")
