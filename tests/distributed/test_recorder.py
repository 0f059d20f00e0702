"""A recorder in two processes against one: DDP and FSDP2 on the CPU, gloo between them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import Recorder, Rectifier, Run, distributed, open_run
from geffect.capture.store_options import StoreOptions
from geffect.layers import trainable
from geffect.sketch import Sketch
from geffect.store.writer import RunWriter
from tests.utils import two_ranks
from tests.utils.layouts import LAYOUTS, Small, ddp, fsdp, nothing_is_gathered, without_reduction
from tests.utils.shares import (
    SIDES,
    assert_same_geometry,
    batch,
    everything,
    losses_of_a_rank,
    trained_in,
)

STEPS = 3


def ascent(model: nn.Module, step: int, own: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The losses of gradient ascent on what a process has."""
    found: dict[str, Any] = {"objective": {"forget": -1.0}}
    with without_reduction(model):
        for side in SIDES:
            labels = own[side]["labels"].roll(step, dims=0)
            logits = model(own[side]["input_ids"].roll(step, dims=0))[:, :-1]
            share = distributed.token_share(int((labels[:, 1:] != -100).sum()))
            mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            found[side] = mean * share
    return found


def of_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    return {side: batch(side, rank) for side in SIDES}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def record(
    model: nn.Module,
    path: Path,
    own: dict[str, dict[str, Tensor]],
    *,
    rectifier: Rectifier | None = None,
    **options: Any,
) -> None:
    optimizer = optimizer_of(model)
    with Recorder(model, path, **options) as recorder:
        for step in range(STEPS):
            recorder.backward(**ascent(model, step, own), rectifier=rectifier)
            optimizer.step()
            optimizer.zero_grad()


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [distributed.local(p.detach()).clone() for p in trainable(model).values()]


def record_on_a_rank(
    layout: str, path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> list[Tensor]:
    model = LAYOUTS[layout](trained_in(layout).to(dtype))
    with nothing_is_gathered():
        record(model, path, of_rank(dist.get_rank()), **options)
    return parameters_of(model)


def keep_on_a_rank(layout: str, path: Path) -> None:
    record_on_a_rank(layout, path, torch.float64, {"store": everything_kept()})


def train_on_a_rank(layout: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same training, unwatched: DDP reduces as it always does."""
    model = LAYOUTS[layout](trained_in(layout).to(dtype))
    optimizer = optimizer_of(model)
    own = of_rank(dist.get_rank())["forget"]
    for step in range(STEPS):
        labels = own["labels"].roll(step, dims=0)[:, 1:]
        logits = model(own["input_ids"].roll(step, dims=0))[:, :-1]
        share = distributed.token_share(int((labels != -100).sum()))
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (-(mean * share)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


DTYPES = (torch.float64, torch.float32)


def record_and_train_on_a_rank(
    layout: str, folder: Path, options: dict[str, Any]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The parameters after a training that is watched, and after one that is not."""
    return [
        (
            record_on_a_rank(layout, folder / f"{dtype}.h5", dtype, options),
            train_on_a_rank(layout, dtype),
        )
        for dtype in DTYPES
    ]


def everything_kept() -> StoreOptions:
    return StoreOptions(sketch=Sketch(width=64), gradients="full")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process that has all of the data, in float64.

    A training amplifies how a step is rounded: in float32, each step parts the two runs by more.
    """
    path = tmp_path_factory.mktemp("alone") / "run.h5"
    return recorded_alone(Small().double(), path)


def recorded_alone(model: nn.Module, path: Path) -> Run:
    record(model, path, {side: everything(side) for side in SIDES}, store=everything_kept())
    return open_run(path)


@pytest.mark.parametrize("options", [{}, {"update": True}], ids=["streamed", "with the update"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_recording_changes_no_training_and_finds_what_one_process_finds(
    layout: str, options: dict[str, Any], alone: Run, tmp_path: Path
) -> None:
    for answer in two_ranks.run(record_and_train_on_a_rank, layout, tmp_path, options):
        for watched, unwatched in answer:
            assert all(map(torch.equal, watched, unwatched))
    for dtype, tolerance, steps in zip(DTYPES, (1e-12, 1e-6), (STEPS, 1), strict=True):
        run = open_run(tmp_path / f"{dtype}.h5")
        assert run.state == "complete"
        assert len(run.steps) == STEPS
        assert run.sources[:3] == alone.sources
        for step in range(steps):
            found, expected = run.gram()[step, :, :3, :3], alone.gram()[step]
            assert_same_geometry(found, expected, tolerance)
        for name, values in alone.losses().items():
            assert run.losses()[name][:steps] == pytest.approx(values[:steps], rel=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_gradients_and_sketches_are_those_of_one_process(layout: str, tmp_path: Path) -> None:
    """They are kept in float32, to the last bit but one."""
    two_ranks.run(keep_on_a_rank, layout, tmp_path / "run.h5")
    run = open_run(tmp_path / "run.h5")
    alone = recorded_alone(trained_in(layout).double(), tmp_path / "alone.h5")
    for source in alone.sources:
        np.testing.assert_allclose(run.sketch(source), alone.sketch(source), rtol=0, atol=1e-6)
        for step in range(STEPS):
            pairs = zip(run.gradient(source, step), alone.gradient(source, step), strict=True)
            for found, expected in pairs:
                np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-12)


def refused_on_a_rank(path: Path) -> tuple[str, str]:
    try:
        Recorder(ddp(Small()), path)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_file_that_is_there_already_stops_all_processes(alone: Run) -> None:
    first, second = two_ranks.run(refused_on_a_rank, alone.path)
    assert first == second
    assert str(alone.path) in first[1]


def broken_on_a_rank(path: Path) -> str:
    """What a process hears of a loss that is not finite on the second one."""
    model = ddp(Small())
    recorder = Recorder(model, path)
    losses = ascent(model, 0, of_rank(dist.get_rank()))
    if dist.get_rank() == 1:
        losses["retain"] = losses["retain"] * float("inf")
    with pytest.raises(ValueError, match="Loss `retain` should be finite") as raised:
        recorder.backward(**losses)
    recorder.close()
    return str(raised.value)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    first, second = two_ranks.run(broken_on_a_rank, tmp_path / "run.h5")
    assert first == second


def uneven_on_a_rank(path: Path) -> str:
    model, rank = ddp(trained_in("ddp")), distributed.rank()
    with Recorder(model, path) as recorder:
        losses = losses_of_a_rank(model)
        if rank == 1:  # a process without retain data
            losses.pop("retain")
        with pytest.raises(ValueError, match=r"same on every process") as refused:
            recorder.backward(objective={"forget": -1.0}, **losses)
    return str(refused.value)


def test_losses_that_differ_between_processes_are_told_apart(tmp_path: Path) -> None:
    said = two_ranks.run(uneven_on_a_rank, tmp_path / "run.h5")
    assert said[0] == said[1]
    assert "0 * loss" in said[0]


def full_disk_on_a_rank(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The file cannot be written from the second step on, which only its writer notices.

    The parameters after that training, and after one that is not watched.
    """
    model = fsdp(Small())
    optimizer = optimizer_of(model)
    own = of_rank(dist.get_rank())
    with Recorder(model, path, on_error="warn") as recorder:
        for step in range(STEPS):
            recorder.backward(**ascent(model, step, own))
            optimizer.step()
            optimizer.zero_grad()
            RunWriter.append = no_room
    return parameters_of(model), train_on_a_rank("fsdp")


def no_room(*_: object) -> None:
    raise OSError("No space left on device")


def test_a_disk_that_fills_up_lets_all_processes_go_on(tmp_path: Path) -> None:
    for watched, unwatched in two_ranks.run(full_disk_on_a_rank, tmp_path / "run.h5"):
        assert all(map(torch.equal, watched, unwatched))
    assert len(open_run(tmp_path / "run.h5").steps) == 1


def window_on_a_rank(layout: str, path: Path) -> None:
    """A step of two micro-batches; the first does not synchronise."""
    model = LAYOUTS[layout](trained_in(layout))
    optimizer = optimizer_of(model)
    own = of_rank(dist.get_rank())
    with Recorder(model, path) as recorder:
        for micro in range(2):
            if layout != "ddp":
                model.set_requires_gradient_sync(micro == 1)
            recorder.backward(**ascent(model, micro, own), accumulate=micro == 0)
        optimizer.step()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_window_of_micro_batches_is_one_row(layout: str, tmp_path: Path) -> None:
    two_ranks.run(window_on_a_rank, layout, tmp_path / "run.h5")
    model, whole = Small(), {side: everything(side) for side in SIDES}
    with Recorder(model, tmp_path / "alone.h5") as recorder:
        for micro in range(2):
            recorder.backward(**ascent(model, micro, whole), accumulate=micro == 0)
    found, expected = open_run(tmp_path / "run.h5"), open_run(tmp_path / "alone.h5")
    assert found.column("n_micro").tolist() == [2]
    assert_same_geometry(found.gram()[0], expected.gram()[0])
