"""Two processes against one: DDP and FSDP2 on the CPU, gloo between them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel

from geffect import Recorder, Rectifier, Run, distributed, dots, open_run
from geffect.capture.store_options import StoreOptions
from geffect.distributed import reduction
from geffect.gradients import Gradients, differentiate, stream
from geffect.layers import describe, trainable
from geffect.losses import plan
from geffect.sketch import Sketch
from geffect.store.writer import RunWriter
from tests.utils import reference, tiny, two_ranks
from tests.utils.layouts import (
    LAYOUTS,
    Small,
    ddp,
    fsdp,
    labelled,
    nothing_is_gathered,
    without_reduction,
)

SIDES = ("forget", "retain")
OBJECTIVE = {"forget": -1.0, "retain": 0.5}


def trained_in(layout: str) -> nn.Module:
    """With adapters, all else but the gate is frozen."""
    model = Small()
    if layout == "fsdp around adapters":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "gate" in name)
    return model


def batch(side: str, rank: int) -> dict[str, Tensor]:
    """What a process sees of a side: the second one has more rows, and more labels."""
    return tiny.batch(2 * rank + SIDES.index(side), rows=2 + 3 * rank)


def everything(side: str) -> dict[str, Tensor]:
    parts = [batch(side, rank) for rank in range(two_ranks.RANKS)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def token_means(model: nn.Module, side: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two losses of one forward: over the labels, and over the labels in reverse."""
    logits = model(own["input_ids"])[:, :-1].flatten(0, 1)
    labels = own["labels"][:, 1:]
    return {
        side: nn.functional.cross_entropy(logits, labels.flatten()),
        f"{side} reversed": nn.functional.cross_entropy(logits, labels.flip(1).flatten()),
    }


def losses_of_a_rank(model: nn.Module) -> dict[str, Tensor]:
    """The losses of a process, so weighted that their averages are means over all tokens."""
    found = {}
    with without_reduction(model):
        for side in SIDES:
            own = batch(side, dist.get_rank())
            share = distributed.token_share(labelled(own))
            found |= {name: x * share for name, x in token_means(model, side, own).items()}
    return found


def separated(model: nn.Module) -> Gradients:
    """The gradients of the step as they are averaged over the processes."""
    distributed.check_layout(model)
    losses = losses_of_a_rank(model)
    distributed.check_unsynchronised(model)
    parameters = list(trainable(model).values())
    with distributed.gradient_sync(model):
        step = differentiate(parameters, {"objective": OBJECTIVE, **losses})
    vectors = distributed.average(parameters, step.vectors)
    means = dict(zip(step.losses, distributed.mean([*step.losses.values()]), strict=True))
    return Gradients(parameters, step.others, vectors, step.weights, means)


def gram_on_a_rank(layout: str) -> tuple[np.ndarray, dict[str, float], list[str]]:
    model = LAYOUTS[layout](trained_in(layout))
    with nothing_is_gathered():
        step = separated(model)
        return step.gram().numpy(), step.losses, [p.name for p in describe(model)]


def gram_of_one_process(layout: str) -> tuple[np.ndarray, dict[str, float]]:
    """Plain autograd on all of the data, and a loop."""
    model, losses = trained_in(layout), {}
    for side in SIDES:
        losses |= token_means(model, side, everything(side))
    total = sum(weight * losses[name] for name, weight in OBJECTIVE.items())
    losses = {"objective": total, **losses}
    vectors = [reference.gradient(model, loss) for loss in losses.values()]
    K = [[[reference.inner(a, b, n) for b in vectors] for a in vectors] for n in vectors[0]]
    return np.array(K), {name: loss.item() for name, loss in losses.items()}


def assert_same_geometry(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Up to so much of |a||b|, which is what decides a sign."""
    norms = np.sqrt(np.einsum("pii->pi", expected))
    assert norms.min() > 0
    assert np.all(abs(found - expected) <= tolerance * norms[:, :, None] * norms[:, None, :])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matrices_are_those_of_one_process(layout: str) -> None:
    expected, losses = gram_of_one_process(layout)
    answers = two_ranks.run(gram_on_a_rank, layout)
    names = [p.name for p in describe(trained_in(layout))]
    for found, means, parameters in answers:
        assert_same_geometry(found, expected)
        assert means == pytest.approx(losses, rel=1e-6)
        assert parameters == names
    assert np.array_equal(answers[0][0], answers[1][0])


def parts_on_a_rank() -> list[tuple[bool, tuple[int, int]]]:
    mesh = init_device_mesh("cpu", (two_ranks.RANKS,))
    found = []
    for shape in SHAPES:
        whole = torch.arange(float(np.prod(shape))).view(shape)
        sharded = distribute_tensor(whole, mesh, [Shard(0)])
        start, stop = distributed.local_range(sharded)
        part = distributed.local(sharded)
        same = torch.equal(part.flatten(), whole.flatten()[start:stop])
        found.append((same and part.data_ptr() == sharded.to_local().data_ptr(), (start, stop)))
    return found


SHAPES = [(15, 8), (4, 4), (1, 4), (3,), (2, 3, 2)]


def test_a_process_knows_where_its_part_begins_and_ends() -> None:
    first, second = two_ranks.run(parts_on_a_rank)
    assert all(right for right, _ in first + second)
    assert [held for _, held in first] == [(0, 64), (0, 8), (0, 4), (0, 2), (0, 6)]
    assert [held for _, held in second] == [(64, 120), (8, 16), (4, 4), (2, 3), (6, 12)]


def ranges_on_a_rank() -> tuple[Any, Any]:
    whole = torch.ones(3, 4)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    copies = init_device_mesh("cpu", (2, 1))
    copied = distribute_tensor(whole, copies, [Replicate(), Shard(0)])
    both = distributed.shard_ranges([whole, sharded, copied])
    return both, dots.grams([[whole], [sharded], [copied]]).flatten().tolist()


def test_each_part_is_kept_once_and_counted_once() -> None:
    for ranges, squares in two_ranks.run(ranges_on_a_rank):
        assert ranges == (((0, 12), (0, 8), (0, 12)), ((0, 0), (8, 12), (0, 0)))
        assert squares == [12.0, 12.0, 12.0]


def refusals_on_a_rank() -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)])
    rows = distribute_tensor(torch.ones(2, 4), mesh, [Shard(0)])
    term = DTensor.from_local(torch.ones(2, 4), mesh, [Partial()])
    assert dots.grams([[columns, None]])[0].tolist() == [[8.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"sharded along its first dimension.*Record Gram"):
        distributed.local_range(columns)
    with pytest.raises(ValueError, match=r"be summed up before .*Found .*Partial.*Redistribute"):
        dots.grams([[term]])
    with pytest.raises(ValueError, match="split over the processes alike"):
        dots.grams([[rows, columns]])


def test_what_has_no_inner_product_is_refused() -> None:
    two_ranks.run(refusals_on_a_rank)


def averages_on_a_rank() -> list[list[list[Any]]]:
    return [averages_in_portions(bucket_bytes) for bucket_bytes in (1, 20, 2**20)]


def averages_in_portions(bucket_bytes: int) -> list[list[Any]]:
    reduction.BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()
    parameters = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(5), torch.zeros(2), torch.zeros(4)]
    parameters[3] = parameters[3].bfloat16()
    shared = [
        torch.arange(3.0) + rank,
        (torch.arange(4.0).view(2, 2) * (1 + rank)).t(),
        None if rank else torch.full((5,), 4.0),
        torch.full((2,), 1.0 + 2 * rank, dtype=torch.bfloat16),
        None,
    ]
    alone = [None, None, torch.ones(5), None, None, torch.full((1 + rank,), 7.0)]
    answer = distributed.average(parameters, {"forget": shared, "retain": alone})
    return [[None if x is None else x.tolist() for x in vector] for vector in answer.values()]


def test_averages_do_not_depend_on_portions_or_on_what_is_absent() -> None:
    shared = [[0.5, 1.5, 2.5], [[0.0, 3.0], [1.5, 4.5]], [2.0] * 5, [2.0, 2.0], None]
    for rank, portions in enumerate(two_ranks.run(averages_on_a_rank)):
        # What follows the parameters' tensors is of one process only.
        alone = [None, None, [1.0] * 5, None, None, [7.0] * (1 + rank)]
        assert portions == [[shared, alone]] * 3


def numbers_on_a_rank() -> tuple[Any, ...]:
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="no labelled token"):
        distributed.token_share(0)
    return (
        distributed.rank(),
        distributed.is_main_process(),
        distributed.world_size(),
        distributed.token_share(1 + 2 * rank),
        distributed.mean([1.0 + rank, float("inf") if rank else 0.0]),
        distributed.broadcast({"next": 7} if rank == 0 else {}),
        distributed.averages(nn.Linear(2, 2)),
        distributed.averages(fsdp(Small())),
    )


def test_numbers_that_processes_share() -> None:
    means, first = [1.5, float("inf")], {"next": 7}
    assert two_ranks.run(numbers_on_a_rank) == [
        (0, True, 2, 0.5, means, first, True, False),
        (1, False, 2, 1.5, means, first, True, False),
    ]


class Unsendable(Exception):
    """An error that pickle cannot bring back."""

    def __init__(self, path: str, *, why: str) -> None:
        super().__init__(f"{path}: {why}")


def failures_on_a_rank(error: Exception | None, culprit: int) -> tuple[str, str] | None:
    try:
        with distributed.raise_on_all_ranks():
            if error is not None and distributed.rank() == culprit:
                raise error
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return None


@pytest.mark.parametrize("culprit", range(2))
def test_what_fails_on_one_process_fails_on_all(culprit: int) -> None:
    error = FileExistsError("`path` should be new.")
    answers = two_ranks.run(failures_on_a_rank, error, culprit)
    assert answers == [("FileExistsError", "`path` should be new.")] * 2
    assert two_ranks.run(failures_on_a_rank, None, culprit) == [None, None]


def unsendable_on_a_rank() -> tuple[str, str] | None:
    return failures_on_a_rank(Unsendable("run.h5", why="full"), 1)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    first, second = two_ranks.run(unsendable_on_a_rank)
    assert first == ("RuntimeError", "Unsendable: run.h5: full")
    assert second == ("Unsendable", "run.h5: full")


def checks_on_a_rank() -> None:
    model = ddp(Small())
    own = batch("forget", dist.get_rank())
    with model.no_sync():
        token_means(model, "forget", own)
    distributed.check_unsynchronised(model)
    token_means(model, "forget", own)
    with pytest.raises(RuntimeError, match=r"inside `with model.no_sync\(\):`. Found .*Put the"):
        distributed.check_unsynchronised(nn.Sequential(model))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    with pytest.raises(ValueError, match=r"should span all processes. Found a process group of 1"):
        distributed.check_layout(DistributedDataParallel(Small(), process_group=alone))
    with pytest.raises(ValueError, match=r"`fully_shard` \(FSDP2\). Found .*Call fully_shard"):
        distributed.check_layout(FullyShardedDataParallel(nn.Linear(2, 2), device_id="cpu"))


def test_what_leaves_no_gradient_of_each_loss_is_refused() -> None:
    two_ranks.run(checks_on_a_rank)


def micro_batches_on_a_rank() -> None:
    """A window whose first micro-batch does not synchronise, as accumulation has it."""
    model, plain = fsdp(Small()), fsdp(Small())
    rank = dist.get_rank()
    for own in (batch("forget", rank), batch("retain", rank)):
        token_means(plain, "forget", own)["forget"].backward()
    model.set_requires_gradient_sync(False)
    with distributed.gradient_sync(model):
        token_means(model, "forget", batch("forget", rank))["forget"].backward()
    assert all(p.grad is not None for p in trainable(model).values())
    kept = {name: p.grad.to_local().clone() for name, p in trainable(model).items()}
    token_means(model, "forget", batch("retain", rank))["forget"].backward()
    # The user's setting is back: this one has not been reduced.
    for name, p in trainable(model).items():
        assert torch.equal(p.grad.to_local(), kept[name])
    with (
        pytest.raises(RuntimeError, match=r"Found \d+ parameters with sums of an earlier backward"),
        distributed.gradient_sync(model),
    ):
        pytest.fail("entered")
    model.set_requires_gradient_sync(True)
    token_means(model, "forget", batch("retain", rank))["forget"].mul(0.0).backward()
    for name, p in trainable(plain).items():
        found = trainable(model)[name].grad.to_local()
        torch.testing.assert_close(found, p.grad.to_local(), rtol=1e-5, atol=1e-7)


def test_micro_batches_that_do_not_synchronise_are_reduced_or_named() -> None:
    two_ranks.run(micro_batches_on_a_rank)


def hooks_on_a_rank(layout: str) -> list[bool]:
    """Whether a hook sees what stands in `.grad` when the backward pass is over."""
    model = LAYOUTS[layout](trained_in(layout))
    seen: dict[str, Tensor] = {}

    def look(name: str, parameter: Tensor) -> None:
        seen[name] = distributed.local(parameter.grad).clone()

    for name, parameter in trainable(model).items():
        parameter.register_post_accumulate_grad_hook(partial(look, name))
    token_means(model, "forget", batch("forget", dist.get_rank()))["forget"].backward()
    final = {name: distributed.local(p.grad) for name, p in trainable(model).items()}
    return [torch.equal(seen[name], final[name]) for name in final]


def test_hooks_see_reduced_gradients_under_fsdp_and_only_there() -> None:
    assert all(all(same) for same in two_ranks.run(hooks_on_a_rank, "fsdp"))
    assert not any(any(same) for same in two_ranks.run(hooks_on_a_rank, "ddp"))


def streamed_on_a_rank() -> list[str]:
    """Where gradients that are shown one by one differ from those that are taken together."""
    model = fsdp(Small())
    parameters = list(trainable(model).values())
    shown: dict[tuple[str, int], Tensor] = {}

    def show(place: int, tensors: Mapping[str, Tensor | None]) -> None:
        shown.update(
            {
                (name, place): distributed.local(x).clone()
                for name, x in tensors.items()
                if x is not None
            }
        )

    with distributed.gradient_sync(model):
        stream(
            parameters, plan(parameters, {"objective": OBJECTIVE, **losses_of_a_rank(model)}), show
        )
    together = {
        (name, place): distributed.local(x)
        for name, vector in separated(model).vectors.items()
        for place, x in enumerate(vector[: len(parameters)])
        if x is not None
    }
    return [
        f"{name} of parameter {place}"
        for name, place in together.keys() | shown.keys()
        if not torch.equal(shown.get((name, place), torch.empty(0)), together[name, place])
    ]


def test_sharded_gradients_can_be_streamed() -> None:
    assert two_ranks.run(streamed_on_a_rank) == [[], []]


def test_one_process_needs_no_partner() -> None:
    model, parameter = nn.Linear(2, 2), torch.ones(2, 3)
    vector = [parameter, None]
    assert distributed.average([parameter, parameter], {"forget": vector}) == {"forget": vector}
    assert distributed.holders(parameter) == ()
    assert distributed.is_main_process()
    distributed.check_layout(model)
    distributed.check_unsynchronised(model)
    with distributed.gradient_sync(model), distributed.raise_on_all_ranks():
        pass


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
    for dtype, tolerance, steps in [(torch.float64, 1e-12, STEPS), (torch.float32, 1e-6, 1)]:
        path = tmp_path / f"{dtype}.h5"
        watched = two_ranks.run(record_on_a_rank, layout, path, dtype, options)
        unwatched = two_ranks.run(train_on_a_rank, layout, dtype)
        for own, other in zip(watched, unwatched, strict=True):
            assert all(map(torch.equal, own, other))
        run = open_run(path)
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


def collectives_on_a_rank(layout: str, path: Path, stepped: bool) -> list[int]:
    """How many reductions each of a few recorded steps makes."""
    count, reduce = [0], dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return reduce(*arguments, **options)

    model = LAYOUTS[layout](trained_in(layout))
    optimizer = optimizer_of(model)
    steps = []
    with Recorder(model, path) as recorder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for _ in range(3):
            losses = losses_of_a_rank(model)
            count[0] = 0
            recorder.backward(objective={"forget": -1.0}, **losses)
            if stepped:
                optimizer.step()
            steps.append(count[0])
    return steps


@pytest.mark.parametrize("stepped", [True, False])
def test_a_step_of_a_sharded_model_makes_few_small_reductions(
    stepped: bool, tmp_path: Path
) -> None:
    """Whether all go on, the inner products of all parameters at once, and the losses.

    Where no optimizer steps, also what has moved in the part of any rank.
    """
    path = tmp_path / "run.h5"
    first, *others = two_ranks.run(collectives_on_a_rank, "fsdp", path, stepped)[0]
    assert others == ([3, 3] if stepped else [4, 4])
    assert first <= 4


def full_disk_on_a_rank(path: Path) -> list[Tensor]:
    """The file cannot be written from the second step on, which only its writer notices."""
    model = fsdp(Small())
    optimizer = optimizer_of(model)
    own = of_rank(dist.get_rank())
    with Recorder(model, path, on_error="warn") as recorder:
        for step in range(STEPS):
            recorder.backward(**ascent(model, step, own))
            optimizer.step()
            optimizer.zero_grad()
            RunWriter.append = no_room
    return parameters_of(model)


def no_room(*_: object) -> None:
    raise OSError("No space left on device")


def test_a_disk_that_fills_up_lets_all_processes_go_on(tmp_path: Path) -> None:
    watched = two_ranks.run(full_disk_on_a_rank, tmp_path / "run.h5")
    unwatched = two_ranks.run(train_on_a_rank, "fsdp")
    for own, other in zip(watched, unwatched, strict=True):
        assert all(map(torch.equal, own, other))
    assert len(open_run(tmp_path / "run.h5").steps) == 1


def window_on_a_rank(layout: str, path: Path) -> None:
    """A step of two micro-batches, of which the first does not synchronise."""
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
