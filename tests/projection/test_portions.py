"""A step in portions: what the optimizer would have done, and seen by others as one step."""

from collections.abc import Sequence
from types import MethodType
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geffect import Rectifier
from geffect.projection.portions import StepInPortions
from tests.utils import shallow as tiny
from tests.utils.network import network, risk
from tests.utils.rectified import OPTIMIZERS, losses_of


@pytest.fixture(autouse=True)
def portion_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 1)


def test_what_is_kept_of_a_portion_is_gone_before_the_next_one_begins() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    risk(model, 0).backward()
    alive: WeakSet[Any] = WeakSet()
    most = []

    class Kept:
        def __init__(self, tensors: Sequence[Tensor]) -> None:
            alive.add(self)
            most.append(len(alive))

        def finish(self) -> None:
            pass

        undo = finish

    StepInPortions(optimizer, Kept, portion_bytes=1).take()
    assert most == [1] * len(list(model.parameters()))


def test_each_tensor_is_stepped_once_between_what_is_called_around_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    risk(model, 0).backward()
    grads = {id(p): p.grad for p in model.parameters()}
    seen: list[int] = []

    class OneTensor:
        def __init__(self, tensors: Sequence[Tensor]) -> None:
            (self.tensor,) = tensors
            self.old = self.tensor.detach().clone()

        def finish(self) -> None:
            stepped = self.old - 0.1 * grads[id(self.tensor)]
            torch.testing.assert_close(self.tensor.detach(), stepped)
            seen.append(id(self.tensor))

        def undo(self) -> None:
            raise AssertionError

    step = StepInPortions(optimizer, OneTensor, portion_bytes=1)
    step.take()
    assert seen == [id(p) for p in model.parameters()]
    ends = [p.detach().clone() for p in model.parameters()]
    optimizer.step()  # finds nothing
    assert all(map(torch.equal, ends, model.parameters()))
    step.put_back()
    assert all(p.grad is grads[id(p)] for p in model.parameters())


def test_hooks_and_schedulers_see_one_step() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    calls: list[str] = []

    def called(name: str) -> Any:
        return lambda *_: calls.append(name)

    # Of this optimizer and of all of them, before and after.
    hooks = [
        optimizer.register_step_pre_hook(called("pre")),
        optimizer.register_step_post_hook(called("post")),
        register_optimizer_step_pre_hook(called("any pre")),
        register_optimizer_step_post_hook(called("any post")),
    ]
    rectifier = Rectifier(model, scope="coordinate", space="update", optimizer=optimizer)

    def counted(self: torch.optim.Optimizer) -> None:
        calls.append("step")
        type(self).step(self)

    optimizer.step = MethodType(counted, optimizer)  # type: ignore[method-assign]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    try:
        for step in range(3):
            calls.clear()
            optimizer.zero_grad()
            rectifier.backward(objective=-risk(model, 0), retain=risk(model, 1))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert not all(map(torch.equal, before, model.parameters()))
            scheduler.step()
            assert calls == ["step", "any pre", "pre", "post", "any post"]
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (step + 1))
            assert all(int(state["step"]) == step + 1 for state in optimizer.state.values())
    finally:
        for hook in hooks:
            hook.remove()


def test_a_portion_that_fails_leaves_hooks_and_gradients() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    risk(model, 0).backward()
    calls: list[int] = []
    hook = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(RuntimeError, match="inside"):
            optimizer.param_groups[0]["lr"] = Failing()
            StepInPortions(optimizer, Nothing, portion_bytes=1).take()
        optimizer.param_groups[0]["lr"] = 0.1
        assert not calls and all(p.grad is not None for p in model.parameters())
        optimizer.step()
        assert calls == [1]
    finally:
        hook.remove()


class Nothing:
    """A portion that is left as it is stepped."""

    def __init__(self, _: Sequence[Tensor]) -> None:
        pass

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        raise AssertionError


class Failing(float):
    """A learning rate that raises when it is used."""

    def __neg__(self) -> Any:
        raise RuntimeError("inside of the step")


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_leaves_its_scale_to_the_optimizer(fused: bool) -> None:
    ends = []
    for whole in (False, True):
        model = tiny.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        rectifier = Rectifier(
            model, scope="coordinate", space="update", optimizer=optimizer, measure_update=whole
        )
        for step in range(2):
            optimizer.zero_grad()
            losses = [tiny_loss(model, 2 * step + i) for i in range(2)]
            rectifier.backward(objective=-losses[0], retain=losses[1], scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))
    assert not all(map(torch.equal, ends[0], tiny.llama().parameters()))


def tiny_loss(model: nn.Module, seed: int) -> Tensor:
    batch = tiny.batch(seed)
    loss: Tensor = model(**batch).loss
    return loss


@pytest.mark.parametrize("options", [{"scope": "coordinate"}, {"rule": None, "select": 0.05}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_portions_is_the_step_of_the_whole(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Following a step needs all of the old parameters, so that it is taken in one.
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 2000)
    results = []
    for measured in (False, True):
        model = tiny.llama()
        optimizer = OPTIMIZERS[name](model.parameters())
        rectifier = Rectifier(
            model, space="update", optimizer=optimizer, measure_update=measured, **options
        )
        for pair in tiny.pairs(2):
            optimizer.zero_grad()
            rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
            grads = [p.grad for p in model.parameters()]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        results.append([*model.parameters(), *[v for v in state if isinstance(v, Tensor)]])
        rectifier.detach()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_in_portions_that_raises_leaves_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, space="update", scope="coordinate", optimizer=optimizer)
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, tiny.pairs(1)[0]))

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    rectifier.detach()
    assert all(p.grad is not None for p in model.parameters())
