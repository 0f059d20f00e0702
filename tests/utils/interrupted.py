"""A small training, watched or rectified, that is interrupted: what it goes on from, and how."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier
from geffect.gradients import separate
from geffect.losses import loss_scale, of_objective, plan
from tests.utils.interrupts import grads_of, same

STEPS = 2

Moment = tuple[int, str]
"""A step, and what was done of it last: begun, its gradient taken, in parts or whole, stepped."""

BEFORE = (-1, "stepped")


@dataclass(frozen=True)
class Setup:
    """A kind of training: options of a rectifier and of a recorder, where it has them."""

    rectifier: Mapping[str, Any] | None = None
    recorder: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    objective: Mapping[str, float] = field(default_factory=lambda: {"forget": -1.0, "retain": 1.0})
    micro: int = 1
    dtype: torch.dtype = torch.float32
    functions: bool = False  # losses are asked for, not given
    overflows: bool = False  # a loss scale that is too large in the first step, right in the second


class Training:
    """A training that is set up so, and all that it goes on from."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(0)
        self.setup = setup
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.Linear(4, 1))
        self.model.to(setup.dtype)
        self.optimizer = setup.optimizer(self.model.parameters(), lr=0.1)
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
            if setup.overflows
            else None
        )
        self.recorder: Recorder | None = None
        self.rectifier: Rectifier | None = None
        if (options := setup.rectifier) is not None:
            needed = options.get("space") == "update" or "measure_update" in options
            placed = {"optimizer": self.optimizer} if needed else {}
            self.rectifier = Rectifier(self.model, **options, **placed)

    def run(self, first: int = 0, part: int = 0) -> Iterator[Moment]:
        """The moments of the steps from one on, whose first micro-batches are taken already."""
        for step in range(first, STEPS):
            self.optimizer.zero_grad()
            yield step, "begun"
            for micro in range(part if step == first else 0, self.setup.micro):
                last = micro + 1 == self.setup.micro
                self._backward(10 * step + 3 * micro, accumulate=not last)
                yield step, "taken" if last else f"part {micro}"
            self.step()
            yield step, "stepped"

    def step(self) -> None:
        """The optimizer's step, or what a scaler of losses makes of it."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def settle(self) -> None:
        """Tell a scaler that its step, which was interrupted, was taken."""
        if self.scaler is not None and self.scaler._per_optimizer_states:
            self.scaler.update()

    def _backward(self, seed: int, *, accumulate: bool) -> None:
        names = {"forget", "retain", *(self.setup.rectifier or {}).get("protect", ())}
        asked = {n: partial(self._loss, seed + i) for i, n in enumerate(sorted(names))}
        losses: Any = asked if self.setup.functions else {n: loss() for n, loss in asked.items()}
        losses["objective"] = self.setup.objective
        how: Any = {"accumulate": accumulate, "scaler": self.scaler}
        if self.recorder is not None:
            self.recorder.backward(rectifier=self.rectifier, **how, **losses)
        elif self.rectifier is not None:
            self.rectifier.backward(**how, **losses)
        else:
            # What is only watched is asked in a fork, and here not at all.
            own = of_objective(losses) if self.setup.functions else losses
            parameters = list(self.model.parameters())
            scale = loss_scale(self.scaler, torch.device("cpu"))
            separate(parameters, plan(parameters, own, scale=scale)).deposit()

    def _loss(self, seed: int) -> Tensor:
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        size = 64.0 if self.setup.overflows else 1.0  # for gradients beyond any doubt too large
        return size * self.model(x.to(self.setup.dtype)).square().sum()


@dataclass(frozen=True)
class Seen:
    """All that a training goes on from at one moment."""

    stepped: list[Tensor | None]  # parameters, and what the optimizer keeps
    remembered: list[Tensor | None]  # by the rectifier
    grads: list[Tensor | None]
    random: Tensor

    @classmethod
    def of(cls, training: Training) -> "Seen":
        parameters = list(training.model.parameters())
        states = [training.optimizer.state.get(p, {}) for p in parameters]
        return cls(
            [
                *(p.detach().clone() for p in parameters),
                *(value.clone() for state in states for value in state.values()),
            ],
            [] if training.rectifier is None else _remembered(training.rectifier),
            grads_of(training.model),
            torch.get_rng_state(),
        )

    def is_like(self, other: "Seen") -> bool:
        return self.is_stepped_like(other) and same(self.grads, other.grads)

    def is_stepped_like(self, other: "Seen") -> bool:
        return same(self.stepped, other.stepped) and same(self.remembered, other.remembered)


def _remembered(rectifier: Rectifier) -> list[Tensor | None]:
    state = rectifier.state_dict()
    memory = state["memory"]
    vectors = [v for kept in memory.values() if isinstance(kept, dict) for v in kept.values()]
    return [
        torch.tensor([memory["count"], memory["floor"], state["skipped"]], dtype=torch.float64),
        state["generator"].clone(),
        *(None if v is None else v.clone() for v in vectors),
    ]


def goes_on(training: Training, last: Moment, seen: Mapping[Moment, Seen]) -> bool:
    """Whether it can be told what the call after the last moment has done, and go on to the end.

    It cannot where a retain gradient was observed and the step not rectified. An error where what
    is left is neither what was before the call nor what was to be after it.
    """
    now, moments = Seen.of(training), list(seen)
    step, done = last
    before = seen[last]
    after = moments[moments.index(last) + 1] if last != moments[-1] else last
    if done == "stepped":
        assert now.is_stepped_like(before)
        training.settle()
        _finish(training, step + 1)
        return True
    if done == "taken":
        # A scaler has divided gradients by its scale before the optimizer is asked, and once.
        as_before = now.is_stepped_like(before) if training.scaler else now.is_like(before)
        if as_before and not now.is_stepped_like(seen[after]):
            training.step()
            now = Seen.of(training)
        assert now.is_stepped_like(seen[after])
        # Where the step was taken and not told of, the optimizer was still to find no gradient.
        assert same(now.grads, seen[after].grads) or all(g is None for g in now.grads)
        training.settle()
        _finish(training, step + 1)
        return True
    if now.is_like(seen[after]) and after[1] == "taken":
        training.step()
        _finish(training, step + 1)
        return True
    if now.is_like(before) and done.startswith("part") and _has_window(training):
        # The interrupt was the caller's: it came before the first line of the next call.
        torch.set_rng_state(before.random)
        _finish(training, step, part=1 + int(done.removeprefix("part ")))
        return True
    if now.is_like(before) or now.is_like(seen[after]):
        torch.set_rng_state(seen[step, "begun"].random)
        _finish(training, step)
        return True
    assert after[1] == "taken"
    assert training.rectifier is not None
    assert same(now.stepped, before.stepped)
    assert same(now.grads, before.grads)
    assert same(now.remembered[2:], seen[after].remembered[2:])
    return False


def _has_window(training: Training) -> bool:
    rectifier = training.rectifier
    return (
        training.recorder is None
        and rectifier is not None
        and vars(rectifier)["_window"] is not None
    )


def _finish(training: Training, step: int, part: int = 0) -> None:
    for _ in training.run(step, part):
        pass
