"""What a step moved: the follower by itself."""

import pytest
import torch
from torch import nn

from geffect.steps import StepFollower


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]


def reached(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("updates", [True, False])
def test_news_are_told_once(updates: bool) -> None:
    a, b = parameters = pair()
    follower = StepFollower(parameters, updates=updates)
    optimizer = torch.optim.SGD([a], lr=0.5)
    reached(parameters)
    follower.begin()
    assert not follower.ready
    follower.enter(optimizer)
    optimizer.step()
    follower.leave(optimizer)
    assert not follower.ready  # b has a gradient too
    move = follower.news(at_gradient=False)
    assert move is not None and move.stepped == (True, False)
    assert (move.lr, move.optimizer and move.optimizer["class"]) == (0.5, "SGD")
    assert follower.news(at_gradient=True) is None
    b.data.add_(1)
    move = follower.news(at_gradient=True)
    assert move is not None and move.stepped == (True, True)
    if updates:
        assert move.update is not None
        assert [u.tolist() for u in move.update] == [[-0.5] * 3, [1.0] * 2]
    else:
        assert move.update is None


def test_what_was_stepped_the_time_before_is_expected() -> None:
    a, b = parameters = pair()
    follower = StepFollower(parameters, updates=False)
    optimizer = torch.optim.SGD([a], lr=0.5)
    ready = []
    for _ in range(2):
        reached(parameters)
        follower.begin()
        follower.enter(optimizer)
        ready.append(follower.ready)
        follower.leave(optimizer)
        ready.append(follower.ready)
        follower.news(at_gradient=True)
        follower.end()
    assert ready == [False, False, False, True]
    assert b.tolist() == [1.0, 1.0]


def test_steps_inside_of_steps_are_one() -> None:
    parameters = pair()
    follower = StepFollower(parameters, updates=False)
    outer, inner = (torch.optim.SGD(parameters, lr=lr) for lr in (0.1, 0.2))
    reached(parameters)
    follower.begin()
    follower.enter(outer)
    follower.enter(inner)
    follower.leave(inner)
    assert not follower.ready
    follower.leave(outer)
    assert follower.ready and follower.final


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_a_change_of_one_number_is_seen(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2**18 + 3, dtype=dtype))
    other = nn.Parameter(torch.ones(1))
    follower = StepFollower([parameter, other], updates=False)
    follower.begin()
    move = follower.news(at_gradient=True)
    assert move is not None and move.stepped is None
    parameter.data[-1] *= 1.01
    move = follower.news(at_gradient=True)
    assert move is not None and move.stepped == (True, False)


def test_values_that_came_back_have_not_moved() -> None:
    a, b = parameters = pair()
    follower = StepFollower(parameters, updates=True)
    optimizer = torch.optim.SGD([a], lr=0.5)
    reached(parameters)
    follower.begin()
    follower.enter(optimizer)
    optimizer.step()
    follower.leave(optimizer)
    follower.news(at_gradient=False)
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.zero_()
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
    assert follower.news(at_gradient=True) is None
    assert b.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("updates", [True, False])
def test_changes_whose_bits_cancel_are_seen(updates: bool) -> None:
    a = nn.Parameter(torch.tensor([1.5, 1.25, 1.75]))
    follower = StepFollower([a], updates=updates)
    for change in (torch.tensor([1.0, -2.0, 1.0]) / 2**10, a.detach().flip(0) - a.detach()):
        follower.begin()
        a.data.add_(change)  # by hand, which moves no version
        move = follower.news(at_gradient=True)
        assert move is not None and move.stepped == (True,)


def test_parts_that_change_places_are_seen() -> None:
    a = nn.Parameter(torch.arange(2**19, dtype=torch.float32))
    follower = StepFollower([a], updates=False)
    follower.begin()
    a.data = a.data.roll(2**18)
    move = follower.news(at_gradient=True)
    assert move is not None and move.stepped == (True,)


def test_an_optimizer_does_not_step_what_has_no_gradient() -> None:
    _, b = parameters = pair()
    follower = StepFollower(parameters, updates=False)
    optimizer = torch.optim.AdamW(parameters, lr=0.5)
    for _ in range(2):
        reached(parameters)
        follower.begin()
        b.grad = None  # as who trains a few layers does
        follower.enter(optimizer)
        optimizer.step()
        optimizer.zero_grad()  # as a hook of the step does
        follower.leave(optimizer)
        assert follower.ready
        move = follower.news(at_gradient=False)
        assert move is not None and move.stepped == (True, False)
        follower.end()
