"""Losses that are functions, in two processes: as with tensors, and an error on one stops all."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import Recorder, Rectifier, distributed, open_run
from geffect.layers import trainable
from tests.utils import two_ranks
from tests.utils.layouts import LAYOUTS, Small, ddp, nothing_is_gathered, without_reduction
from tests.utils.shares import SIDES, batch

STEPS = 2


def risk(model: nn.Module, own: dict[str, Tensor], step: int) -> Tensor:
    labels = own["labels"].roll(step, dims=0)[:, 1:]
    logits = model(own["input_ids"].roll(step, dims=0))[:, :-1]
    share = distributed.token_share(int((labels != -100).sum()))
    return share * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def trained_on_a_rank(
    layout: str, folder: Path, way: str, rectified: bool, micro: int
) -> list[Tensor]:
    model = LAYOUTS[layout](Small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rectifier = Rectifier(model) if rectified else None
    own = {side: batch(side, dist.get_rank()) for side in SIDES}
    with Recorder(model, folder / f"{way}.h5") as recorder, nothing_is_gathered():
        for step in range(STEPS):
            for part in range(micro):
                losses: dict[str, Any] = {
                    side: partial(risk, model, own[side], step + part) for side in SIDES
                }
                if way == "tensors":
                    with without_reduction(model):
                        losses = {side: ask() for side, ask in losses.items()}
                recorder.backward(
                    objective={"forget": -1.0}, **losses, rectifier=rectifier,
                    accumulate=part < micro - 1,
                )  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
    return [distributed.local(p.detach()).clone() for p in trainable(model).values()]


def both_on_a_rank(layout: str, folder: Path, rectified: bool, micro: int) -> list[list[Tensor]]:
    return [
        trained_on_a_rank(layout, folder, way, rectified, micro) for way in ("functions", "tensors")
    ]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_functions_train_and_record_as_tensors(
    layout: str, rectified: bool, micro: int, tmp_path: Path
) -> None:
    for functions, tensors in two_ranks.run(both_on_a_rank, layout, tmp_path, rectified, micro):
        assert all(map(torch.equal, functions, tensors))
    found, expected = (open_run(tmp_path / f"{way}.h5") for way in ("functions", "tensors"))
    assert found.sources == expected.sources
    assert np.array_equal(found.gram(), expected.gram(), equal_nan=True)


def broken_on_a_rank(path: Path, kind: str) -> str:
    """What a process hears of a function that fails on the second one."""
    model = ddp(Small())
    own = {side: batch(side, dist.get_rank()) for side in SIDES}

    def retain() -> Any:
        loss = risk(model, own["retain"], 0)
        if dist.get_rank() == 0:
            return loss
        if kind == "raises":
            raise ZeroDivisionError("only here")
        return loss * float("inf") if kind == "infinite" else loss.item()

    with Recorder(model, path) as recorder:
        with pytest.raises((ZeroDivisionError, ValueError, TypeError)) as raised:
            recorder.backward(
                objective={"forget": -1.0}, forget=partial(risk, model, own["forget"], 0),
                retain=retain,
            )  # fmt: skip
        assert all(p.grad is None for p in model.parameters())
        recorder.backward(
            objective={"forget": -1.0},
            **{side: partial(risk, model, own[side], 0) for side in SIDES},
        )
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("raises", "only here"), ("infinite", "should be finite"), ("float", "returned `float`")],
)
def test_a_function_that_fails_on_one_process_stops_all(
    kind: str, says: str, tmp_path: Path
) -> None:
    first, second = two_ranks.run(broken_on_a_rank, tmp_path / "a.h5", kind)
    assert says in first
    assert first == second
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0]


def uneven_on_a_rank(path: Path) -> str:
    model = ddp(Small())
    own = batch("forget", dist.get_rank())
    with without_reduction(model):
        loss = risk(model, own, 0)
    given: Any = loss if dist.get_rank() else partial(risk, model, own, 0)
    with (
        Recorder(model, path) as recorder,
        pytest.raises(ValueError, match="same on every process") as raised,
    ):
        recorder.backward(objective=given)
    return str(raised.value)


def test_a_function_on_one_process_is_a_function_on_all(tmp_path: Path) -> None:
    first, second = two_ranks.run(uneven_on_a_rank, tmp_path / "a.h5")
    assert first == second
