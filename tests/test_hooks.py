"""No hook outlives the block that it is registered in, wherever an interrupt comes."""

import copy
import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.effects import InstanceEffects, sample_effects, token_effects
from geffect.hooks import Hooks
from geffect.interrupts import put_back_after, to_the_end
from tests.utils import tiny
from tests.utils.interrupts import grads_of, hooks_left, interrupted_registration, same

Scenario = Callable[[nn.Module, torch.optim.Optimizer, Path], None]


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(torch.full((2, 3), 1.0 + seed)).square().sum()


def recorded(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    with Recorder(model, folder / "a.h5", overwrite=True) as recorder:
        recorder.backward(
            objective={"forget": -1.0}, forget=loss_of(model), retain=loss_of(model, 1)
        )


def rectified(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    rectifier.backward(objective={"forget": -1.0, "retain": 1.0}, forget=loss_of(model),
                       retain=loss_of(model, 1))  # fmt: skip
    rectifier.detach()


def unattached(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    Rectifier(model).backward(objective=loss_of(model), retain=loss_of(model, 1))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", [recorded, rectified, unattached])
def test_an_interrupted_registration_leaves_no_hook(
    tmp_path: Path, scenario: Scenario, after: bool
) -> None:
    for number in count(1):
        model, optimizer = small()
        loss_of(model, 2).backward()
        before = grads_of(model)
        if scenario is not recorded:
            optimizer.zero_grad()
            before = grads_of(model)
        with interrupted_registration(number, after=after) as registered:
            try:
                scenario(model, optimizer, tmp_path)
            except KeyboardInterrupt:
                assert same(grads_of(model), before)
        assert not hooks_left(model, optimizer)
        # The next step is what it is in a model that was never looked at.
        expected, plain = small()
        for one, stepper in ((model, optimizer), (expected, plain)):
            stepper.zero_grad()
            loss_of(one).backward()
            stepper.step()
        assert same(list(model.parameters()), list(expected.parameters()))
        if registered[0] < number:
            break
    assert number > 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("of", ["samples", "tokens"])
def test_effects_leave_no_hook(of: str, after: bool) -> None:
    model, batch = tiny.gpt2(), tiny.batch(0)
    model.transformer.wte.padding_idx = 0
    along = [torch.ones_like(p) for p in model.parameters()]
    for number in (*range(1, 8), 25, 10**9):
        with interrupted_registration(number, after=after) as registered:
            try:
                if of == "samples":
                    sample_effects(model, [batch], {"forget": along})
                else:
                    token_effects(model, batch, along)
            except KeyboardInterrupt:
                assert registered[0] == number
        assert not hooks_left(model)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_parameter_that_a_module_returns_keeps_no_hook() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.ones(1, 2))

        def forward(self) -> Tensor:
            return self.words

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = Prompt()

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.prompt()).sum()

    model, x = Model(), torch.tensor([[3.0, 4.0]])
    with InstanceEffects(model, [torch.tensor([[1.0, 10.0]])]) as effects:
        model(x).backward()
    assert effects.by_parameter.tolist() == [[43.0]]
    assert not hooks_left(model)


def test_hooks_of_others_stay() -> None:
    model, optimizer = small()
    model.register_forward_hook(print)
    hooks = Hooks()
    hooks.add(model.register_forward_hook, repr, with_kwargs=True)
    hooks.add(optimizer.register_step_pre_hook, repr)
    hooks.add(optimizer.register_step_pre_hook, str)
    hooks.remove(keep=1)
    assert hooks_left(model, optimizer) == [print, str]
    hooks.remove()
    assert hooks_left(model, optimizer) == [print]
    assert not model._forward_hooks_with_kwargs


def test_what_is_put_back_is_put_back_to_its_end() -> None:
    put = []

    def interrupted_once() -> None:
        put.append("begun")
        if len(put) == 1:
            raise KeyboardInterrupt
        put.append("done")

    with pytest.raises(KeyboardInterrupt):
        put_back_after(lambda: 1, interrupted_once)
    assert put == ["begun", "begun", "done"]
    put.clear()
    with pytest.raises(KeyboardInterrupt):
        to_the_end(interrupted_once)
    assert put == ["begun", "begun", "done"]


def test_recorders_come_and_go_while_other_optimizers_step(tmp_path: Path) -> None:
    """A lost recorder may be collected, or closed by a thread, in the midst of any step."""
    (model, optimizer), (other, _) = small(), small()
    recorders = [Recorder(other, tmp_path / "other.h5")]
    optimizer.register_step_pre_hook(lambda *_: recorders.append(Recorder(model, tmp_path / "a")))
    optimizer.register_step_post_hook(lambda *_: [recorder.close() for recorder in recorders])
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model).backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not hooks_left(other)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_what_follows_steps_is_not_copied(way: Callable[[Any], Any], tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        model.watched_by = recorder
        attached = Rectifier(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        for own in (recorder, model, attached, {"rectifier": attached}):
            with pytest.raises(TypeError, match="should not be copied or pickled: its hooks"):
                way(own)
        del model.watched_by
        recorder.backward(objective=lambda: model(torch.ones(2)).sum())
    assert len(open_run(tmp_path / "a.h5").gram()) == 1


def test_a_rectifier_that_follows_no_optimizer_is_copied_with_its_model() -> None:
    model = nn.Linear(2, 1)
    copied, rectifier = copy.deepcopy((model, Rectifier(model)))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, -0.5])
    losses = {"forget": copied(x).sum(), "retain": copied(y).sum() - copied(x).sum()}
    rectifier.backward(objective={"forget": 1.0}, **losses)
    rectified = torch.cat([copied.weight.grad.flatten(), copied.bias.grad])
    retain = torch.tensor([1.0, -2.5, 0.0])
    assert abs(torch.dot(rectified, retain)) < 1e-6 and rectified.any()
