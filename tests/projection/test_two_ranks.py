"""Rectified training on two processes is that of one: DDP and FSDP2 on the CPU, over gloo."""

import copy
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from geffect import Rectifier, distributed
from geffect.gradients import reduced
from geffect.layers import trainable
from geffect.losses import plan
from geffect.projection import SAGO, SaliencyMask, hamu, nearest, selection
from geffect.projection.kept import State
from geffect.projection.memory import RetainMemory
from tests.utils import tiny, two_ranks
from tests.utils.layouts import LAYOUTS, Small, labelled, nothing_is_gathered, without_reduction

SIDES = ("forget", "retain", "world")
STEPS = 3
SHARDINGS = ["ddp", "fsdp"]


def batch(side: str, step: int, rank: int) -> dict[str, Tensor]:
    """What a process sees: the second one has more rows, and more labels."""
    return tiny.batch(100 * step + 10 * SIDES.index(side) + rank, rows=2 + 3 * rank)


def own_batches(step: int) -> dict[str, dict[str, Tensor]]:
    """What this process sees in a step; all there is where it is the only one."""
    if distributed.world_size() > 1:
        return {side: batch(side, step, distributed.rank()) for side in SIDES}
    parts = {side: [batch(side, step, r) for r in range(two_ranks.RANKS)] for side in SIDES}
    return {
        side: {key: torch.cat([part[key] for part in both]) for key in both[0]}
        for side, both in parts.items()
    }


def losses_of(model: nn.Module, step: int, *sides: str) -> dict[str, Tensor]:
    """Means over the tokens of all processes, each from a forward of its own."""
    found = {}
    for side, own in own_batches(step).items():
        if side not in sides:
            continue
        with without_reduction(model):
            logits = model(own["input_ids"])[:, :-1]
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), own["labels"][:, 1:].flatten())
        found[side] = mean * distributed.token_share(labelled(own))
    return found


def model_in(layout: str | None) -> nn.Module:
    """In float64, so that nothing but a mistake makes a difference that Adam can blow up."""
    model = Small().double()
    return model if layout is None else LAYOUTS[layout](model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)


def made(model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> Rectifier:
    rectifier = Rectifier(model, **options)
    if rectifier.needs_optimizer:
        rectifier.attach(optimizer)
    return rectifier


def parts_of(model: nn.Module) -> list[Tensor]:
    return [distributed.local(p.detach()).clone() for p in trainable(model).values()]


def numbers(rectifier: Rectifier) -> list[float]:
    assert rectifier.report is not None
    return [x for name, row in vars(rectifier.report).items() if name != "blocks" for x in row]


def trained(layout: str | None, options: dict[str, Any]) -> tuple[list[Tensor], list[list[float]]]:
    """The parameters after some rectified steps, and what was said of each."""
    model = model_in(layout)
    optimizer = adamw(model)
    rectifier = made(model, optimizer, options)
    said = []
    for step in range(STEPS):
        losses = losses_of(model, step, "forget", *options.get("protect", ["retain"]))
        rectifier.backward(objective={"forget": -1.0, "retain": 0.2}, **losses)
        optimizer.step()
        optimizer.zero_grad()
        said.append(numbers(rectifier))
    rectifier.detach()
    return parts_of(model), said


WAYS: dict[str, dict[str, Any]] = {
    "gru": {},
    "only watched": {"rule": None},
    "gru in update space": {"space": "update"},
    "a constraint a layer": {"scope": "layer"},
    "a constraint a parameter, in update space": {"scope": "parameter", "space": "update"},
    "coordinates": {"scope": "coordinate"},
    "coordinates in update space": {"scope": "coordinate", "space": "update"},
    "selected": {"select": 0.3},
    "selected coordinates in update space": {
        "select": 0.3, "scope": "coordinate", "space": "update",
    },
    "selected by layers in update space": {"select": 0.3, "scope": "layer", "space": "update"},
    "SSU's mask": {"rule": None, "select": SaliencyMask(0.5)},
    "nearest to two sets": {"rule": nearest, "protect": ("retain", "world")},
    "nearest to two sets in update space": {
        "rule": nearest, "protect": ("retain", "world"), "space": "update",
    },
    "SAGO": {"rule": SAGO(0.5), "part": "forget", "ema": 1.0},
    "HAMU": {"rule": hamu(0.01, radius=0.1), "part": "forget", "ema": 1.0},
    "GU": {"rule": nearest, "history": 2, "space": "update", "correction": "adam"},
    "scaled correction": {"space": "update", "correction": "retain_adam"},
    "followed": {"measure_update": True},
}  # fmt: skip


def trained_on_a_rank(layout: str) -> list[Any]:
    selection.SAMPLE = 200  # of a thousand: not every coordinate is looked at
    with nothing_is_gathered():
        return [trained(layout, options) for options in WAYS.values()]


@cache
def trained_alone(way: str) -> tuple[list[Tensor], list[list[float]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SAMPLE", 200)
        return trained(None, WAYS[way])


def together(layout: str, first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The whole parameters, from what the processes hold."""
    if layout == "fsdp":
        return [torch.cat(parts) for parts in zip(first, second, strict=True)]
    # Not one bit apart, or they would drift away from each other.
    assert all(map(torch.equal, first, second))
    return first


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", SHARDINGS)
def test_rectified_training_is_that_of_one_process(layout: str) -> None:
    answers = two_ranks.run(trained_on_a_rank, layout)
    plain, _ = trained(None, {"rule": None})
    for name, (first, said), (second, also) in zip(WAYS, *answers, strict=True):
        expected, reports = trained_alone(name)
        assert_close(together(layout, first, second), expected)
        torch.testing.assert_close(
            torch.tensor(said), torch.tensor(also), rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(
            torch.tensor(said), torch.tensor(reports), rtol=1e-5, atol=1e-9, equal_nan=True
        )
        changed = not all(map(torch.equal, expected, plain))
        assert changed is (name != "only watched"), f"{name} does nothing here"


def window_of(layout: str | None, options: dict[str, Any]) -> list[Tensor]:
    """Two steps of two micro-batches each; FSDP2 is told to reduce after the last only."""
    model = model_in(layout)
    optimizer = adamw(model)
    rectifier = made(model, optimizer, options)
    for micro in range(4):
        last = micro % 2 == 1
        if layout == "fsdp":
            model.set_requires_gradient_sync(last)
        losses = losses_of(model, micro, "forget", "retain")
        rectifier.backward(objective={"forget": -1.0}, **losses, accumulate=not last)
        if last:
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert all(p.grad is None for p in trainable(model).values())
    return parts_of(model)


WINDOWS: list[dict[str, Any]] = [{}, {"scope": "coordinate", "space": "update"}]


def windows_on_a_rank(layout: str) -> list[list[Tensor]]:
    return [window_of(layout, options) for options in WINDOWS]


@pytest.mark.parametrize("layout", SHARDINGS)
def test_a_micro_batch_that_does_not_synchronise_is_part_of_its_step(layout: str) -> None:
    for options, first, second in zip(
        WINDOWS, *two_ranks.run(windows_on_a_rank, layout), strict=True
    ):
        assert_close(together(layout, first, second), window_of(None, options))


def refused_on_a_rank() -> None:
    model = model_in("ddp")
    loss = model(own_batches(0)["forget"]["input_ids"]).sum()
    with pytest.raises(RuntimeError, match=r"inside `with model.no_sync\(\):`. Found .* Put the"):
        Rectifier(model).backward(objective={"retain": -1.0}, retain=loss)


def test_a_forward_that_ddp_would_reduce_is_refused() -> None:
    two_ranks.run(refused_on_a_rank)


def left_out_on_a_rank(layout: str) -> tuple[list[Tensor], int, list[float]]:
    """A retain gradient that is not finite where one process alone has the coordinate."""
    model = model_in(layout)
    optimizer = adamw(model)
    rectifier = made(model, optimizer, {"space": "update"})
    for step in range(3):
        losses = losses_of(model, step, "forget", "retain")
        if step == 1:
            losses["retain"] = losses["retain"] * 0.0
        if step == 2:
            at_kink = (model.module if layout == "ddp" else model).gate.bias * 0.0
            losses["retain"] = losses["retain"] + at_kink.sqrt().sum()
        with pytest.warns(UserWarning, match="not rectified") if step == 1 else nothing():
            rectifier.backward(objective={"forget": -1.0}, **losses)
        optimizer.step()
        optimizer.zero_grad()
    return parts_of(model), rectifier.skipped, numbers(rectifier)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("layout", SHARDINGS)
def test_what_is_left_out_on_one_process_is_left_out_on_all(layout: str) -> None:
    (first, skipped, said), (second, also_skipped, also_said) = two_ranks.run(
        left_out_on_a_rank, layout
    )
    assert skipped == also_skipped == 2
    assert [math.isnan(x) for x in said] == [math.isnan(x) for x in also_said]
    assert all(tensor.isfinite().all() for tensor in together(layout, first, second))


NOISY: list[dict[str, Any]] = [
    {"space": "update"}, {"select": 0.3, "space": "update"}, {"select": 0.3, "scope": "layer"},
    {"scope": "coordinate"},
]  # fmt: skip


def begun_with_noise(layout: str | None, options: dict[str, Any]) -> tuple[list[Tensor], int]:
    """The parameters after steps; the first of them have no retain gradient."""
    model = model_in(layout)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    rectifier = made(model, optimizer, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, size in enumerate([1e-12, 1e-10, 1.0, 1e-12, 1.0]):
            losses = losses_of(model, step, "forget", "retain")
            losses["retain"] = size * losses["retain"]
            rectifier.backward(objective={"forget": -1.0}, **losses)
            optimizer.step()
            optimizer.zero_grad()
    rectifier.detach()
    return parts_of(model), rectifier.skipped


def noise_on_a_rank(layout: str) -> list[Any]:
    return [begun_with_noise(layout, options) for options in NOISY]


@pytest.mark.parametrize("layout", SHARDINGS)
def test_noise_is_noise_on_every_process(layout: str) -> None:
    answers = two_ranks.run(noise_on_a_rank, layout)
    for options, (first, skipped), (second, also) in zip(NOISY, *answers, strict=True):
        expected, count = begun_with_noise(None, options)
        assert skipped == also == count == 3
        assert_close(together(layout, first, second), expected)


COORDINATES: list[dict[str, Any]] = [{"scope": "coordinate"}, {"rule": SAGO()}]


def each_alone_on_a_rank() -> list[tuple[int, list[float], bool]]:
    return [alone_on_a_rank(options) for options in COORDINATES]


def alone_on_a_rank(options: dict[str, Any]) -> tuple[int, list[float], bool]:
    """A retain gradient that is not finite on the first process, where each decides for itself."""
    model = model_in("fsdp")
    rectifier = Rectifier(model, **options)
    losses = losses_of(model, 0, "forget", "retain")
    if distributed.rank() == 0:
        rectifier._memory.update = lambda *a, **k: "not finite"  # type: ignore[method-assign]
    before = [g.clone() for g in gradients_alone(model)]
    with pytest.warns(UserWarning, match="not finite") if distributed.rank() == 0 else nothing():
        rectifier.backward(objective={"forget": -1.0}, **losses)
    left = [distributed.local(p.grad) for p in trainable(model).values()]
    return rectifier.skipped, numbers(rectifier), all(map(torch.equal, before, left))


def gradients_alone(model: nn.Module) -> list[Tensor]:
    """What this process holds of the objective's gradient."""
    watching = Rectifier(model, rule=None)
    watching.backward(objective={"forget": -1.0}, **losses_of(model, 0, "forget", "retain"))
    grads = [distributed.local(p.grad) for p in trainable(model).values()]
    model.zero_grad()
    return grads


def test_a_process_that_leaves_its_coordinates_alone_reports_with_the_others() -> None:
    for here, there in zip(*two_ranks.run(each_alone_on_a_rank), strict=True):
        (skipped, said, same), (none, also, other_same) = here, there
        assert (skipped, none) == (1, 0)
        assert same and not other_same
        torch.testing.assert_close(torch.tensor(said), torch.tensor(also), equal_nan=True)


def float32_on_a_rank(layout: str) -> list[Tensor]:
    model = LAYOUTS[layout](Small())
    return descended(model)


def descended(model: nn.Module) -> list[Tensor]:
    """Some steps of gradient descent in float32, in which nothing blows a rounding up."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    rectifier = Rectifier(model)
    for step in range(STEPS):
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, step, "forget", "retain"))
        optimizer.step()
        optimizer.zero_grad()
    return parts_of(model)


@pytest.mark.parametrize("layout", SHARDINGS)
def test_rectified_training_in_float32_is_that_of_one_process(layout: str) -> None:
    first, second = two_ranks.run(float32_on_a_rank, layout)
    assert_close(together(layout, first, second), descended(Small()))


TALKS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    # Coordinates ask no other process,
    ({"scope": "coordinate", "space": "gradient"}, (0, 1)),
    ({"scope": "coordinate", "space": "update"}, (0, 1)),
    # and a constraint takes one reduction of inner products and one of the peak.
    ({"space": "gradient"}, (2, 0)),
    ({"space": "update"}, (2, 0)),
]


def talks_on_a_rank() -> list[tuple[int, int]]:
    return [collectives_on_a_rank(options) for options, _ in TALKS]


def collectives_on_a_rank(options: dict[str, Any]) -> tuple[int, int]:
    """How many there are in a rectification, the passes apart, and in looking at the report."""
    model = model_in("fsdp")
    optimizer = adamw(model)
    rectifier = made(model, optimizer, options)
    parameters = list(trainable(model).values())
    for step in range(2):
        passes = plan(
            parameters,
            {"objective": {"forget": -1.0}, **losses_of(model, step, "forget", "retain")},
        )
        gradients = reduced(model, parameters, passes)
        with CommDebugMode() as step_talk:
            rectifier.observe(gradients)
            rectifier.rectify(gradients)
            optimizer.step()
        with CommDebugMode() as report_talk:
            assert rectifier.report is not None
        optimizer.zero_grad()
    return step_talk.get_total_counts(), report_talk.get_total_counts()


def test_a_rectification_asks_other_processes_as_seldom_as_it_can() -> None:
    assert two_ranks.run(talks_on_a_rank) == [[expected for _, expected in TALKS]] * 2


RESUMED: list[dict[str, Any]] = [
    {"select": 0.3, "space": "update"},
    {"scope": "coordinate", "space": "update", "state": State(torch.bfloat16)},
]


def each_resumed_on_a_rank(layout: str) -> list[bool]:
    return [resumed_on_a_rank(layout, options) for options in RESUMED]


def resumed_on_a_rank(layout: str, options: dict[str, Any]) -> bool:
    """Whether a run that was stopped in between has the same parameters, bit for bit."""

    def go_on(model: nn.Module, rectifier: Rectifier, optimizer: Any, steps: range) -> None:
        for step in steps:
            losses = losses_of(model, step, "forget", "retain")
            rectifier.backward(objective={"forget": -1.0}, **losses)
            optimizer.step()
            optimizer.zero_grad()

    model = model_in(layout)
    optimizer = adamw(model)
    rectifier = made(model, optimizer, options)
    go_on(model, rectifier, optimizer, range(2))
    file = io.BytesIO()
    torch.save(rectifier.state_dict(), file)
    saved, moments = parts_of(model), copy.deepcopy(optimizer.state_dict())
    go_on(model, rectifier, optimizer, range(2, 4))

    again = model_in(layout)
    for parameter, part in zip(trainable(again).values(), saved, strict=True):
        distributed.local(parameter.detach()).copy_(part)
    other = adamw(again)
    other.load_state_dict(moments)
    second = made(again, other, options)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    go_on(again, second, other, range(2, 4))
    return all(map(torch.equal, parts_of(model), parts_of(again)))


@pytest.mark.parametrize("layout", SHARDINGS)
def test_a_run_that_was_resumed_equals_the_one_that_was_not(layout: str) -> None:
    assert two_ranks.run(each_resumed_on_a_rank, layout) == [[True] * len(RESUMED)] * 2


def remembered_on_a_rank() -> tuple[list[Tensor], str]:
    model = model_in("fsdp")
    parameters = trainable(model)
    memory = RetainMemory(["retain"], 0.5, second_moment=True, state=State(torch.bfloat16, "cpu"))
    for step in range(2):
        losses = {"objective": losses_of(model, step, "retain")["retain"]}
        gradients = reduced(model, list(parameters.values()), plan([*parameters.values()], losses))
        assert memory.update({"retain": gradients.of("objective")}) is None
    averages, scales = memory.vector("retain"), map(memory.scale, range(len(parameters)))
    for parameter, average, scale in zip(parameters.values(), averages, scales, strict=True):
        for tensor in (average, scale):
            assert isinstance(tensor, DTensor)
            assert tensor.placements == parameter.placements and tensor.dtype == torch.float32
    try:
        memory.load_state_dict(memory.state_dict(list(parameters)), Small().state_dict())
    except ValueError as error:
        return [distributed.local(a) for a in averages], str(error)
    raise AssertionError("A part was taken for the whole.")


def test_what_is_remembered_of_shards_is_sharded_alike() -> None:
    (first, error), (second, _) = two_ranks.run(remembered_on_a_rank)
    steps = []
    for step in range(2):
        model = model_in(None)
        losses_of(model, step, "retain")["retain"].backward()
        steps.append([p.grad for p in trainable(model).values()])
    for found, *gradients in zip(together("fsdp", first, second), *steps, strict=True):
        # Each of the two was rounded, to 8 bits.
        size = sum(gradient.abs() for gradient in gradients)
        assert ((found.double() - sum(gradients) / 2).abs() <= size * 2**-7).all()
    assert "should have the" in error
