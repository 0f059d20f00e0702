"""Streamed gradients: each shown once, inside of the last pass, and let go; `.grad` bit for bit."""

import gc
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geffect import Recorder, open_run
from geffect.gradients import differentiate, stream
from geffect.losses import Graph, Loss, plan
from geffect.objectives import SharedForward, WeightedGradientAscent, nll
from tests.utils import tiny

Taken = dict[int, dict[str, Tensor | None]]


def taken(parameters: list[Tensor], losses: Mapping[str, Loss]) -> Taken:
    seen: Taken = {}

    def take(place: int, tensors: Mapping[str, Tensor | None]) -> None:
        assert place not in seen
        seen[place] = {
            name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()
        }

    stream(parameters, plan(parameters, losses), take)
    return seen


def losses_of(model: nn.Module, kind: str, index: int = 0) -> dict[str, Loss]:
    pair = tiny.pairs(index + 1)[index]
    forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
    shared = SharedForward(model)
    return {
        "ascent": {"objective": {"forget": -1.0}, "forget": forget, "retain": retain},
        "difference": {
            "objective": {"forget": -1.0, "retain": 0.5}, "forget": forget, "retain": retain,
        },
        "tensor": {
            "objective": WeightedGradientAscent(1.0)(model, pair),
            "forget": forget, "retain": retain,
        },
        "shared": {
            "objective": WeightedGradientAscent(1.0)(shared, pair),
            "forget": nll(shared, pair["forget"]),
        },
        "objective last": {"retain": retain, "objective": -forget},
        "objective alone": {"objective": -forget},
    }[kind]  # fmt: skip


KINDS = ["ascent", "difference", "tensor", "shared", "objective last", "objective alone"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shows_and_leaves_what_separate_passes_do(kind: str, tied: bool) -> None:
    model = tiny.llama(tied=tied)
    parameters: list[Tensor] = list(model.parameters())
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)  # added to, as by backward
    step = differentiate(parameters, losses_of(model, kind))
    step.deposit(copy=True)
    expected = [p.grad for p in parameters]
    model.zero_grad()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    seen = taken(parameters, losses_of(model, kind))
    assert sorted(seen) == list(range(len(parameters)))
    for place, tensors in seen.items():
        assert list(tensors) == list(step.vectors)
        for name, tensor in tensors.items():
            other = step.vectors[name][place]
            assert (tensor is None) == (other is None)
            assert tensor is None or torch.equal(tensor, other)
    for parameter, grad in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_a_parameter_that_the_last_loss_does_not_reach_is_shown_too() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    seen = taken([first, second], {"objective": (first * second).sum(), "retain": second.sum()})
    assert seen[0]["retain"] is None
    assert torch.equal(seen[0]["objective"], torch.ones(2))
    assert torch.equal(first.grad, torch.ones(2))


def test_what_the_objective_does_not_need_is_let_go_at_once() -> None:
    layers = [nn.Parameter(torch.full((4, 4), 0.5)) for _ in range(6)]

    def loss(power: float) -> Tensor:
        x = torch.ones(4)
        for layer in layers:
            x = layer @ x
        return (x**power).sum()

    alive: list[weakref.ref[Tensor]] = []
    counts = []

    def take(place: int, tensors: Mapping[str, Tensor | None]) -> None:
        alive.append(weakref.ref(tensors["retain"]))
        counts.append(sum(ref() is not None for ref in alive))

    losses = {"objective": loss(1.0), "retain": loss(2.0)}
    stream(layers, plan(layers, losses), take)
    # The retain gradient never stands whole: one tensor, and at most the one before it.
    assert len(counts) == len(layers)
    assert max(counts) <= 2
    assert sum(ref() is not None for ref in alive) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_shows_the_sums_of_its_micro_batches(kind: str, dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    parameters: list[Tensor] = list(model.parameters())
    micro = range(3)
    steps = [differentiate(parameters, losses_of(model, kind, i)) for i in micro]
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    for step in steps:
        step.deposit(copy=True)
    expected = [p.grad for p in parameters]
    sums: dict[str, list[Tensor | None]] = {name: list(v) for name, v in steps[0].vectors.items()}
    for step in steps[1:]:
        for name, vector in step.vectors.items():
            pairs = zip(sums[name], vector, strict=True)
            sums[name] = [b if a is None else a if b is None else a + b for a, b in pairs]
    model.zero_grad()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    found: dict[str, list[Tensor | None]] = {}
    for i in micro:
        passes = plan(parameters, losses_of(model, kind, i))
        objective = passes.order.weights["objective"]
        before = {name: vector[0] for name, vector in found.items()}
        shown: dict[str, list[Tensor | None]] = {name: [] for name in passes.order.names}
        for vector in shown.values():
            vector.extend([None] * len(parameters))

        def keep(
            index: int, tensors: Mapping[str, Tensor | None], shown: dict[str, Any] = shown
        ) -> None:
            for name, tensor in tensors.items():
                shown[name][index] = tensor

        stream(parameters, passes, keep, earlier=found)
        # In place: nothing but the sums is kept, and none of them lies in `.grad`.
        grads = [p.grad for p in parameters]
        for name, vector in shown.items():
            assert not i or vector[0] is before[name] or name in objective
            assert not any(a is b for a, b in zip(vector, grads, strict=True) if a is not None)
        found = shown
    for name, vector in sums.items():
        for a, b in zip(found[name], vector, strict=True):
            assert a is b or (torch.equal(a, b) and a.dtype == dtype)
    for parameter, grad in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_a_window_holds_one_sum_a_source_while_its_passes_run() -> None:
    weights = [nn.Parameter(torch.full((8, 8), 0.3 + 0.01 * i)) for i in range(5)]
    size, most = weights[0].numel(), []

    def loss(power: float) -> Tensor:
        x = torch.ones(8)
        for weight in weights:
            x = weight @ x
        x.register_hook(lambda _: most.append(alive()))
        return (x**power).sum()

    def alive() -> int:
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == size]
        return len({t.untyped_storage().data_ptr() for t in found})

    here = alive()
    sums: dict[str, list[Tensor | None]] = {}
    for _ in range(3):
        shown: dict[str, list[Tensor | None]] = {n: [None] * 5 for n in ("objective", "a", "b")}

        def keep(
            index: int, tensors: Mapping[str, Tensor | None], shown: dict[str, Any] = shown
        ) -> None:
            for name, tensor in tensors.items():
                shown[name][index] = tensor

        losses = {
            "objective": partial(loss, 1.0), "a": partial(loss, 2.0), "b": partial(loss, 3.0)
        }  # fmt: skip
        stream(weights, plan(weights, losses), keep, earlier=sums)
        sums = shown
    # Three sums, what lies in `.grad`, and the objective's own gradient until it is added to both.
    assert max(most) - here == 5 * 5


def test_a_loss_that_fails_in_its_backward_leaves_grads_and_hooks_as_they_were() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            raise RuntimeError("in the middle")

    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    x.grad = kept = torch.zeros(2)
    losses = {"objective": (x * y).sum(), "retain": (Fails.apply(x) * y).sum()}
    with pytest.raises(RuntimeError, match="in the middle"):
        taken([x, y], losses)
    assert x.grad is kept
    assert y.grad is None
    (x * y).sum().backward()  # no hook takes it away
    assert torch.equal(y.grad, torch.ones(2))


def test_a_reentrant_checkpoint_is_told_from_others() -> None:
    layer = nn.Linear(3, 3)
    x = torch.ones(1, 3, requires_grad=True)
    for reentrant in (False, True):
        loss = checkpoint(layer, checkpoint(layer, x, use_reentrant=reentrant),
                          use_reentrant=reentrant).sum()  # fmt: skip
        assert Graph.of(loss).accumulates_once is not reentrant


class RunsBackward(torch.autograd.Function):
    """A checkpoint of somebody else's: its backward pass runs one of its own."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function, ctx.x = function, x.detach()
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(x), grad)
        return None, x.grad


class NamesItsInput(torch.autograd.Function):
    """It notes a tensor under the name that the nodes of leaves have for theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = torch.ones(2, requires_grad=True)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_leaves_are_told_by_the_kind_of_their_nodes() -> None:
    x = torch.ones(2, requires_grad=True)
    graph = Graph.of(NamesItsInput.apply(x).sum())
    assert [*graph.leaves.values()] == [x]
    assert len(graph.operations) == 2


def test_a_backward_inside_of_a_backward_keeps_the_objective(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)

    def loss() -> Tensor:
        x = torch.ones(1, 3, requires_grad=True)
        return RunsBackward.apply(layer, RunsBackward.apply(layer, x)).square().sum()

    loss().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    parameters = list(layer.parameters())
    assert not Graph.of(loss()).accumulates_once
    with Recorder(layer, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=loss())
    for parameter, grad in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, grad)
    gram = open_run(tmp_path / "run.h5").gram()[0, :, 0, 0]
    assert gram.tolist() == pytest.approx([float(g.square().sum()) for g in expected])
