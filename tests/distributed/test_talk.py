"""How often processes ask each other in a step, what for, and what becomes of a failure of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import Recorder, Rectifier
from geffect.layers import trainable
from geffect.projection import Salient
from tests.utils import reductions, two_ranks
from tests.utils.layouts import LAYOUTS, ddp
from tests.utils.shares import losses_of_a_rank, trained_in

STEPS = 3

AGREED = "of_all_ranks"  # whether all go on; and losses, peaks, and what is there to be averaged
STREAMED = "Window._stream"  # that, and the inner products and sketches of all parameters
MEASURED = "Collector.measured"  # these alone
OF_RULE = "GramAccumulator.by_block"  # those that a rule is asked about
LENGTHS = "_lengths"  # of the parameters, beside a promise that holds up to their rounding
MOVED = "_FollowedStep._anywhere"  # whether somebody else moves them, which the next gradient tells
THRESHOLD = "Salient.threshold"
BUCKET = "reduced"  # of gradients under DDP
PRESENT = "reduced"  # which gradients of the objective there are

RECORDED: dict[str, dict[str, Any]] = {
    "gram": {},
    "sketch": {"store": "sketch"},
    "update": {"update": True},
}
RECTIFIED: dict[str, dict[str, Any]] = {
    "gradient": {},
    "update space": {"space": "update"},
    "coordinate": {"scope": "coordinate", "space": "update"},
    "select": {"select": Salient(0.5)},
}

SHARDED: dict[str, list[str]] = {
    "gram": [STREAMED],
    "sketch": [STREAMED],
    "update": [MOVED, AGREED, MEASURED],
    "by hand": [MOVED, STREAMED],
    "window": [STREAMED, STREAMED],
    "gradient": [AGREED, OF_RULE],
    "update space": [AGREED, OF_RULE],
    "coordinate": [AGREED],
    "select": [AGREED, THRESHOLD, OF_RULE],
    "recorded gradient": [AGREED, OF_RULE, MEASURED, LENGTHS],
}
WHOLE: dict[str, list[str]] = {
    **{mode: [AGREED, BUCKET] for mode in SHARDED},
    "window": [AGREED, BUCKET] * 2,
}
EXPECTED = {"fsdp": SHARDED, "ddp": WHOLE}
"""Of every step but the first of its kind."""

Step = Callable[[dict[str, Any]], None]


def asked(model: nn.Module, own: dict[str, Tensor]) -> dict[str, Any]:
    """The same losses as functions."""
    return {name: lambda name=name: losses_of_a_rank(model)[name] for name in own}


def step_of(
    mode: str, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> tuple[Recorder | None, Step]:
    """A recorder, if there is one, and what makes one step of losses."""
    objective = {"forget": -1.0}
    options = RECTIFIED.get(mode.removeprefix("recorded "))
    rectifier = None if options is None else Rectifier(model, optimizer=optimizer, **options)
    if rectifier is not None and mode in RECTIFIED:
        return None, lambda losses: rectifier.backward(objective=objective, **losses)
    recorder = Recorder(model, path, **RECORDED.get(mode, {}))

    def record(losses: dict[str, Any]) -> None:
        if mode == "window":
            recorder.backward(objective=objective, **losses, accumulate=True)
        recorder.backward(objective=objective, **losses, rectifier=rectifier)

    return recorder, record


def talk_on_a_rank(layout: str, folder: Path) -> dict[str, list[list[str]]]:
    """What the processes ask each other in each step, by mode."""
    found: dict[str, list[list[str]]] = {}
    for mode in SHARDED:
        model = LAYOUTS[layout](trained_in(layout))
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
        recorder, step = step_of(mode, model, optimizer, folder / f"{mode}.h5")
        found[mode] = []
        for _ in range(STEPS):
            losses = asked(model, losses_of_a_rank(model))
            with reductions.named() as steps:
                step(losses)
                if mode != "by hand":
                    optimizer.step()
            optimizer.zero_grad()
            found[mode].append([name for name in steps if name != "losses_of_a_rank"])
        if recorder is not None:
            recorder.close()
    return found


@pytest.mark.parametrize("layout", EXPECTED)
def test_processes_ask_each_other_as_seldom_as_they_can(layout: str, tmp_path: Path) -> None:
    first, second = two_ranks.run(talk_on_a_rank, layout, tmp_path)
    assert first == second
    for mode, expected in EXPECTED[layout].items():
        assert first[mode][1:] == [expected] * (STEPS - 1), mode
        # A kind of step that is new is compared before its passes, and has more to tell after them.
        assert len(first[mode][0]) <= len(expected) + 4


def tensors_on_a_rank(layout: str, path: Path) -> list[list[str]]:
    """What rectified and recorded steps ask where losses are tensors."""
    model = LAYOUTS[layout](trained_in(layout))
    recorder, rectifier = Recorder(model, path), Rectifier(model)
    found = []
    for backward in (recorder.backward, rectifier.backward):
        for _ in range(2):
            losses = losses_of_a_rank(model)
            with reductions.named() as steps:
                backward(objective={"forget": -1.0}, **losses)
            model.zero_grad()
        found.append(steps)
    return found


@pytest.mark.parametrize(
    ("layout", "recorded", "rectified"),
    [
        ("fsdp", [MOVED, STREAMED], [AGREED, OF_RULE]),
        # The retain gradient is let go before that of the objective is there.
        ("ddp", [AGREED, BUCKET], [AGREED, BUCKET, PRESENT, BUCKET]),
    ],
)
def test_losses_that_are_tensors_ask_for_no_more(
    layout: str, recorded: list[str], rectified: list[str], tmp_path: Path
) -> None:
    for found in two_ranks.run(tensors_on_a_rank, layout, tmp_path / "run.h5"):
        assert found == [recorded, rectified]


def infinite(loss: Any) -> Any:
    return loss * float("inf") if isinstance(loss, Tensor) else lambda: loss() * float("inf")


def broken_on_a_rank(layout: str, folder: Path) -> list[tuple[str, bool, int]]:
    """What each process hears of a loss that is not finite on one; and what there is then."""
    said = []
    for as_functions in (False, True):
        for culprit in range(two_ranks.RANKS):
            model = LAYOUTS[layout](trained_in(layout))
            path = folder / f"{as_functions}{culprit}.h5"
            with Recorder(model, path) as recorder:
                for step in range(2):
                    model.zero_grad()
                    losses: dict[str, Any] = losses_of_a_rank(model)
                    if as_functions:
                        losses = asked(model, losses)
                    if step == 1 and dist.get_rank() == culprit:
                        losses["retain"] = infinite(losses["retain"])
                    try:
                        recorder.backward(objective={"forget": -1.0}, **losses)
                    except ValueError as error:
                        empty = all(p.grad is None for p in trainable(model).values())
                        said.append((str(error), empty, recorder.next_step))
    return said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_on_one_process_leaves_nothing_on_any(
    layout: str, tmp_path: Path
) -> None:
    first, second = two_ranks.run(broken_on_a_rank, layout, tmp_path)
    assert first == second and len(first) == 4
    for message, empty, step in first:
        assert message.startswith("Loss `retain` should be finite. Found inf")
        assert empty and step == 1


def lost_on_a_rank(path: Path) -> list[str]:
    """A process that comes without one of the losses later on, and one that fails."""
    model, said = ddp(trained_in("ddp")), []
    with Recorder(model, path) as recorder:
        for step in range(4):
            losses = losses_of_a_rank(model)
            if step in (1, 3) and dist.get_rank() == 1:
                losses.pop("retain")
            if step == 2 and dist.get_rank() == 1:
                losses["retain"] = losses["retain"].detach()
            try:
                recorder.backward(objective={"forget": -1.0}, **losses)
            except ValueError as error:
                said.append(str(error))
            model.zero_grad()
    return said


def test_under_ddp_what_differs_or_fails_later_is_told_to_all(tmp_path: Path) -> None:
    first, second = two_ranks.run(lost_on_a_rank, tmp_path / "run.h5")
    assert first == second
    differs, fails, again = first
    assert differs == again and "same on every process" in differs
    assert "Found a tensor without a graph" in fails


def closed_on_a_rank(path: Path) -> list[str]:
    """A file that cannot be written, of which the passes of FSDP2 keep nobody waiting."""
    model, said = LAYOUTS["fsdp"](trained_in("fsdp")), []
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    recorder = Recorder(model, path)
    for step in range(3):
        if step == 1 and dist.get_rank() == 0:
            recorder._recording._writer.append = _no_room  # type: ignore[method-assign]
        try:
            recorder.backward(objective={"forget": -1.0}, **losses_of_a_rank(model))
        except OSError as error:
            said.append(str(error))
        optimizer.step()
        optimizer.zero_grad()
    return said


def _no_room(*_: object) -> None:
    raise OSError("No space left on device")


def test_under_fsdp_a_file_that_cannot_be_written_stops_all(tmp_path: Path) -> None:
    assert two_ranks.run(closed_on_a_rank, tmp_path / "run.h5") == [["No space left on device"]] * 2
