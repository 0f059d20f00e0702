"""Rectified steps in two processes: their source in the record, and half precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import Recorder, Rectifier, distributed, open_run
from geffect.layers import trainable
from tests.utils import two_ranks
from tests.utils.layouts import LAYOUTS, Small, without_reduction
from tests.utils.shares import SIDES, assert_same_geometry, batch, everything, trained_in

STEPS = 2


def ascent(model: nn.Module, own: dict[str, dict[str, Tensor]], step: int) -> dict[str, Tensor]:
    """The risks of what a process has."""
    found = {}
    with without_reduction(model):
        for side in SIDES:
            labels = own[side]["labels"].roll(step, dims=0)
            logits = model(own[side]["input_ids"].roll(step, dims=0))[:, :-1]
            share = distributed.token_share(int((labels[:, 1:] != -100).sum()))
            mean = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels[:, 1:].flatten()
            )
            found[side] = mean * share
    return found


def recorded(model: nn.Module, path: Path, own: dict[str, dict[str, Tensor]], rate: float) -> None:
    update = next(model.parameters()).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=rate)
    rectifier = Rectifier(
        model, ema=1.0, optimizer=optimizer, space="update" if update else "gradient"
    )
    with Recorder(model, path, update=update) as recorder:
        for step in range(STEPS):
            recorder.backward(
                objective={"forget": -1.0}, rectifier=rectifier, **ascent(model, own, step)
            )
            optimizer.step()
            optimizer.zero_grad()


def on_a_rank(layout: str, path: Path, dtype: torch.dtype, rate: float) -> list[Tensor]:
    model = LAYOUTS[layout](trained_in(layout).to(dtype))
    recorded(model, path, {side: batch(side, dist.get_rank()) for side in SIDES}, rate)
    return [distributed.local(p.detach()).clone() for p in trainable(model).values()]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_what_is_handed_on_is_what_one_process_hands_on(layout: str, tmp_path: Path) -> None:
    two_ranks.run(on_a_rank, layout, tmp_path / "two.h5", torch.float64, 1e-3)
    both = {side: everything(side) for side in SIDES}
    recorded(Small().double(), tmp_path / "one.h5", both, 1e-3)
    one, two = open_run(tmp_path / "one.h5"), open_run(tmp_path / "two.h5")
    assert one.sources == two.sources and one.sources[-1] == "rectified"
    for step in range(STEPS):
        assert_same_geometry(two.gram()[step], one.gram()[step], 1e-6)  # averages are float32


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_in_half_precision_the_applied_step_harms_on_no_process(
    layout: str, tmp_path: Path
) -> None:
    first, second = two_ranks.run(on_a_rank, layout, tmp_path / "run.h5", torch.bfloat16, 1e-5)
    run = open_run(tmp_path / "run.h5")
    K = run.gram().sum(axis=1)
    d, r = run.index("update"), run.index("retain_ema")
    assert (K[:, d, d] > 0).all() and run.rectification()[1]["fired"].any()
    assert (K[:, d, r] <= 1e-6 * np.sqrt(K[:, d, d] * K[:, r, r])).all()
    if layout == "ddp":
        assert all(map(torch.equal, first, second))
