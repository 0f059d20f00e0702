"""A rectified training that is interrupted anywhere: each call is whole, or was not made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.projection import SAGO, Elementwise, State, nearest
from tests.utils.interrupts import grads_of, hooks_left, interrupted_at_line, moments, same

STEPS = 3


@dataclass(frozen=True)
class Setup:
    """A kind of rectified training."""

    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    objective: Mapping[str, float] = field(default_factory=lambda: {"forget": -1.0, "retain": 1.0})
    micro: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def in_update_space(self) -> bool:
        return self.options.get("space") == "update"


class Halving(Elementwise):
    """A rule for every coordinate that is not ours."""

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        return torch.where(u * retain[0] < 0, 0.5 * u, u)


UPDATE = {"space": "update"}
APART = {"forget": -1.0}
SETUPS = {
    "gradient": Setup(),
    "apart": Setup(objective=APART),
    "layers": Setup({"scope": "layer"}),
    "coordinates": Setup({"scope": "coordinate"}),
    "part": Setup({"part": "forget"}),
    "sets": Setup({"rule": nearest, "protect": ("retain", "world")}),
    "select": Setup({"select": 0.5}),
    "sago": Setup({"rule": SAGO()}),
    "half": Setup({"state": State(torch.bfloat16)}, objective=APART),
    "bfloat16": Setup(dtype=torch.bfloat16),
    "measured": Setup({"measure_update": True}),
    "micro-batches": Setup(micro=2),
    "update": Setup(UPDATE),
    "update of layers": Setup(UPDATE | {"scope": "layer"}, objective=APART),
    "update by adam": Setup(UPDATE | {"correction": "retain_adam"}),
    "update of momentum": Setup(
        UPDATE, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)
    ),
    "update of micro-batches": Setup(UPDATE, micro=2),
    "update of coordinates": Setup(UPDATE | {"scope": "coordinate"}),
    "update of selected": Setup(UPDATE | {"rule": None, "select": 0.5}, objective=APART),
    "update by another": Setup(UPDATE | {"rule": Halving()}),
    "update of bfloat16": Setup(UPDATE, dtype=torch.bfloat16),
    "update measured": Setup(UPDATE | {"measure_update": True, "select": 0.5}),
}


class Training:
    """A rectified training and all that it goes on from."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(0)
        self.setup = setup
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.Linear(4, 1))
        self.model.to(setup.dtype)
        self.optimizer = setup.optimizer(self.model.parameters(), lr=0.1)
        needed = setup.in_update_space or "measure_update" in setup.options
        self.rectifier = Rectifier(
            self.model, **setup.options, **({"optimizer": self.optimizer} if needed else {})
        )

    def backward(self, step: int) -> None:
        for micro in range(self.setup.micro):
            losses = {
                name: self.loss(10 * step + 3 * micro + place)
                for place, name in enumerate(("forget", "retain", "world"))
                if name != "world" or "protect" in self.setup.options
            }
            self.rectifier.backward(
                objective=self.setup.objective,
                accumulate=micro + 1 < self.setup.micro,
                **losses,
            )

    def loss(self, seed: int) -> Tensor:
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        return self.model(x.to(self.setup.dtype)).square().sum()

    def run(self, first: int = 0) -> Iterator[tuple[int, str]]:
        for step in range(first, STEPS):
            self.optimizer.zero_grad()
            yield step, "begun"
            self.backward(step)
            yield step, "taken"
            self.optimizer.step()
            yield step, "stepped"

    @property
    def stepped(self) -> list[Tensor | None]:
        """What an optimizer steps: parameters, and its own state."""
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        return [
            *(p.detach().clone() for p in self.model.parameters()),
            *(value.clone() for state in states for value in state.values()),
        ]

    @property
    def remembered(self) -> list[Tensor | None]:
        """What the rectifier remembers."""
        state = self.rectifier.state_dict()
        memory = state["memory"]
        numbers = [memory["count"], memory["floor"], state["skipped"]]
        vectors = [v for kept in memory.values() if isinstance(kept, dict) for v in kept.values()]
        return [
            torch.tensor(numbers, dtype=torch.float64),
            state["generator"].clone(),
            *(None if v is None else v.clone() for v in vectors),
        ]


@dataclass(frozen=True)
class Seen:
    """All of it at one moment."""

    stepped: list[Tensor | None]
    remembered: list[Tensor | None]
    grads: list[Tensor | None]
    random: Tensor

    @classmethod
    def of(cls, training: Training) -> "Seen":
        return cls(
            training.stepped,
            training.remembered,
            grads_of(training.model),
            torch.get_rng_state(),
        )


@cache
def undisturbed(name: str) -> tuple[dict[tuple[int, str], Seen], int, int]:
    """All moments of a training that nobody interrupts; its lines, and its hooks."""
    training = Training(SETUPS[name])
    seen = {moment: Seen.of(training) for moment in training.run()}
    hooks = len(hooks_left(training.model, training.optimizer))
    training = Training(SETUPS[name])
    with interrupted_at_line(0, KeyboardInterrupt) as lines:
        for _ in training.run():
            pass
    return seen, lines[0], hooks


@pytest.fixture(autouse=True)
def several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 50)


@pytest.mark.parametrize("name", SETUPS)
def test_an_interrupt_at_any_line_leaves_every_call_whole(name: str) -> None:
    seen, lines, hooks = undisturbed(name)
    for number, error in moments(lines, few=3):
        training, done = Training(SETUPS[name]), (-1, "stepped")
        with pytest.raises(error), interrupted_at_line(number, error):
            for moment in training.run():
                done = moment
        where = f"{name}, line {number}, {error.__name__} after {done}"
        if goes_on(training, done, seen, where):
            assert same(training.stepped, seen[STEPS - 1, "stepped"].stepped), where
            assert same(training.remembered, seen[STEPS - 1, "stepped"].remembered), where
        assert len(hooks_left(training.model, training.optimizer)) <= hooks, where
        assert all(p.requires_grad for p in training.model.parameters()), where


def goes_on(
    training: Training, last: tuple[int, str], seen: dict[tuple[int, str], Seen], where: str
) -> bool:
    """Find out what the call that was interrupted has done, and go on to the end if that can be."""
    now, (step, done) = Seen.of(training), last
    begun, taken, stepped = (seen[step, stage] for stage in ("begun", "taken", "stepped"))
    if done == "taken":  # in the step of the optimizer
        # Where the step was taken and not told of, the optimizer is still to find no gradient.
        hidden = all(g is None for g in now.grads) and same(now.stepped, stepped.stepped)
        assert hidden or same(now.grads, taken.grads), where
        if same(now.stepped, taken.stepped) and not same(now.stepped, stepped.stepped):
            assert same(now.remembered, taken.remembered), where
            training.optimizer.step()
        assert same(training.stepped, stepped.stepped), where
        assert same(training.remembered, stepped.remembered), where
        finish(training, step + 1)
        return True
    assert same(now.stepped, begun.stepped), where
    if any(g is not None for g in now.grads):
        assert same(now.grads, taken.grads), where
        assert same(now.remembered, taken.remembered), where
        training.optimizer.step()
        finish(training, step + 1)
        return True
    if same(now.remembered, begun.remembered):
        torch.set_rng_state(begun.random)
        finish(training, step)
        return True
    # The retain gradient was observed, wholly, and the objective's was not rectified.
    assert same(now.remembered[2:], taken.remembered[2:]), where
    return False


def finish(training: Training, step: int) -> None:
    for _ in training.run(step):
        pass
