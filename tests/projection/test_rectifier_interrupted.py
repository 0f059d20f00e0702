"""A rectified training that is interrupted anywhere: each call is whole, or was not made."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from geffect.projection import SAGO, Elementwise, State, nearest
from tests.utils.interrupted import BEFORE, STEPS, Moment, Seen, Setup, Training, goes_on
from tests.utils.interrupts import hooks_left, interrupted_at_line, moments, same


class Halving(Elementwise):
    """A rule for every coordinate that is not ours."""

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        return torch.where(u * retain[0] < 0, 0.5 * u, u)


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


UPDATE = {"space": "update"}
APART = {"forget": -1.0}
SETUPS = {
    "gradient": Setup({}),
    "apart": Setup({}, objective=APART),
    "layers": Setup({"scope": "layer"}),
    "coordinates": Setup({"scope": "coordinate"}),
    "part": Setup({"part": "forget"}),
    "sets": Setup({"rule": nearest, "protect": ("retain", "world")}),
    "select": Setup({"select": 0.5}),
    "sago": Setup({"rule": SAGO()}),
    "half": Setup({"state": State(torch.bfloat16)}, objective=APART),
    "bfloat16": Setup({}, dtype=torch.bfloat16),
    "measured": Setup({"measure_update": True}),
    "micro-batches": Setup({}, micro=2),
    "update": Setup(UPDATE),
    "update of layers": Setup(UPDATE | {"scope": "layer"}, objective=APART),
    "update by adam": Setup(UPDATE | {"correction": "retain_adam"}),
    "update, fused": Setup(UPDATE, optimizer=partial(torch.optim.AdamW, fused=True)),
    "update of momentum": Setup(UPDATE, optimizer=momentum),
    "update of micro-batches": Setup(UPDATE, micro=2),
    "update of coordinates": Setup(UPDATE | {"scope": "coordinate"}),
    "update of selected": Setup(UPDATE | {"rule": None, "select": 0.5}, objective=APART),
    "update by another": Setup(UPDATE | {"rule": Halving()}),
    "update of bfloat16": Setup(UPDATE, dtype=torch.bfloat16),
    "overflow": Setup({}, overflows=True),
    "overflow of selected": Setup({"select": 0.5}, objective=APART, overflows=True),
    "overflow of coordinates": Setup({"scope": "coordinate"}, overflows=True),
    "overflow of micro-batches": Setup({}, micro=2, overflows=True),
    "overflow in update": Setup(UPDATE, overflows=True),
    "overflow in update of micro-batches": Setup(UPDATE, micro=2, overflows=True),
    "overflow in update of coordinates": Setup(UPDATE | {"scope": "coordinate"}, overflows=True),
    "update measured": Setup(UPDATE | {"measure_update": True, "select": 0.5}),
}


@cache
def undisturbed(name: str) -> tuple[dict[Moment, Seen], int, int]:
    """All moments of a training that nobody interrupts; its lines, and its hooks."""
    training = Training(SETUPS[name])
    seen = {BEFORE: Seen.of(training)}
    with interrupted_at_line(0, KeyboardInterrupt) as lines:
        for moment in training.run():
            come = lines[0]
            seen[moment] = Seen.of(training)
            lines[0] = come
    hooks = len(hooks_left(training.model, training.optimizer))
    return seen, lines[0], hooks


@pytest.fixture(autouse=True)
def several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 50)


@pytest.mark.parametrize("name", SETUPS)
def test_an_interrupt_at_any_line_leaves_every_call_whole(name: str) -> None:
    seen, lines, hooks = undisturbed(name)
    for number, error in moments(lines, few=2):
        training, done = Training(SETUPS[name]), BEFORE
        # What comes while Python forgets an object is lost.
        with suppress(error), interrupted_at_line(number, error):
            for moment in training.run():
                done = moment
        where = f"{name}, line {number}, {error.__name__} after {done}"
        if goes_on(training, done, seen):
            assert Seen.of(training).is_stepped_like(seen[STEPS - 1, "stepped"]), where
        assert len(hooks_left(training.model, training.optimizer)) <= hooks, where
        assert all(p.requires_grad for p in training.model.parameters()), where


@pytest.mark.parametrize("name", [name for name in SETUPS if SETUPS[name].overflows])
def test_the_first_step_overflows_and_the_second_does_not(name: str) -> None:
    seen, _, _ = undisturbed(name)
    start, skipped, taken = seen[BEFORE], seen[0, "stepped"], seen[1, "stepped"]
    assert skipped.is_stepped_like(start)
    assert not all(bool(g.isfinite().all()) for g in seen[0, "taken"].grads if g is not None)
    assert not same(taken.stepped[:4], start.stepped[:4])


@pytest.mark.parametrize("name", ["gradient", "update", "update of coordinates"])
def test_an_error_of_hooks_of_others_leaves_every_call_whole(name: str) -> None:
    seen, _, _ = undisturbed(name)

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    training = Training(SETUPS[name])
    after_step = training.optimizer.register_step_post_hook(fails)
    with pytest.raises(ZeroDivisionError):
        for _ in training.run():
            pass
    after_step.remove()
    # The step was rectified before others were told of it.
    assert Seen.of(training).is_like(seen[0, "stepped"])
    training.optimizer.zero_grad()
    in_backward = next(training.model.parameters()).register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        for _ in training.run(1):
            pass
    in_backward.remove()
    assert goes_on(training, (1, "begun"), seen)
    assert Seen.of(training).is_like(seen[STEPS - 1, "stepped"])
