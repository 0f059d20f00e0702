"""What modules remember in all kinds of ways is after a look what it would have been without."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from geffect.beside import beside
from geffect.beside.remembered import remembered


class Remembering(nn.Module):
    """Multiplies by what it is told by something that remembers how often it was asked."""

    def __init__(self, made: Callable[[], Any], ask: Callable[["Remembering"], Any]) -> None:
        super().__init__()
        self.past, self.ask = made(), ask

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.ask(self))


@dataclass(slots=True, frozen=True)
class Slotted:
    seen: list[int]


@dataclass(slots=True)
class Counting:
    calls: int = 0


class Pair(NamedTuple):
    total: Tensor
    names: str


class Listed(list[int]):
    def clear(self) -> None:
        raise RuntimeError("it is cleared as a list is")


def raised(owner: Any, name: str = "calls") -> int:
    setattr(owner, name, getattr(owner, name, 0) + 1)
    return int(getattr(owner, name))


def appended(numbers: Any) -> int:
    numbers.append(1)
    return len(numbers)


def rebound(module: Remembering) -> int:
    module.past = [*module.past, 1]
    return len(module.past)


def made_lazily(module: Remembering) -> int:
    module.made = getattr(module, "made", [])
    return appended(module.made)


def taken_away(module: Remembering) -> int:
    if not hasattr(module, "past"):
        return 3
    del module.past
    return 2


def a_new_tuple(module: Remembering) -> int:
    module.past = (module.past[0] + 1, "calls")
    return int(module.past[0])


def another_function(module: Remembering) -> float:
    module.past = np.cos if module.past is np.sin else np.sin
    return float(module.past(1.0))


def keys_so_far(module: Remembering) -> int:
    keys, _ = module.past.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    return int(keys.shape[-2])


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Remembering], Any]]] = {
    "another list": (list, rebound),
    "a list made by the first forward": (list, made_lazily),
    "an attribute that is gone": (list, taken_away),
    "another tuple": (lambda: (0, "calls"), a_new_tuple),
    "another function": (lambda: np.cos, another_function),
    "a tensor in a tuple": (
        lambda: Pair(torch.ones(()), "total"),
        lambda module: module.past.total.mul_(1.5),
    ),
    "a list in a tuple": (lambda: ([],), lambda module: appended(module.past[0])),
    "an array": (lambda: np.zeros(()), lambda module: np.add(module.past, 1, out=module.past)),
    "bytes": (bytearray, lambda module: appended(module.past)),
    "a list of its own class": (Listed, lambda module: appended(module.past)),
    "a dict of its own class": (
        type("Registry", (dict,), {}),
        lambda module: module.past.setdefault("seen", []).append(1) or len(module.past["seen"]),
    ),
    "an object in an object": (
        lambda: SimpleNamespace(inner=SimpleNamespace()),
        lambda module: raised(module.past.inner),
    ),
    "an object beside a function and a device": (
        lambda: SimpleNamespace(grows=abs, device=torch.device("cpu"), dtype=torch.float32),
        lambda module: raised(module.past),
    ),
    "an object that has nothing yet": (SimpleNamespace, lambda module: raised(module.past)),
    "slots": (Counting, lambda module: raised(module.past)),
    "frozen slots": (lambda: Slotted([]), lambda module: appended(module.past.seen)),
    "objects that hold each other": (
        lambda: (lambda one: setattr(one, "other", SimpleNamespace(one=one)) or one)(
            SimpleNamespace()
        ),
        lambda module: raised(module.past.other),
    ),
    "a cache of keys and values": (DynamicCache, keys_so_far),
}


@pytest.mark.parametrize("look", [None, "beside", "plain"])
@pytest.mark.parametrize("way", WAYS)
def test_a_module_remembers_what_it_would_have_alone(way: str, look: str | None) -> None:
    """The last look is one that is noticed."""
    model, twin = Remembering(*WAYS[way]), Remembering(*WAYS[way])
    found, expected = [], []
    for step in range(1, 4):
        if look:
            with beside(model) if look == "beside" else nullcontext():
                model(torch.full((2,), 7.0))
        found.append(model(torch.full((2,), float(step))))
        expected.append(twin(torch.full((2,), float(step))))
    assert all(map(torch.equal, found, expected)) == (look != "plain")


def test_what_is_held_is_itself_afterwards_and_shared_as_before() -> None:
    array, total = np.zeros(2), torch.zeros(2)
    model = nn.Identity()
    model.past = [array, {"in": (array, total)}, total]
    first, inner, last = model.past
    pair = inner["in"]
    with beside(model):
        assert model.past[0] is inner["in"][0] is not array
        assert model.past[2] is inner["in"][1] is not total
        model.past[0] += 1
        model.past[2].add_(1)
    assert model.past[0] is first is array and model.past[2] is last is total
    assert inner["in"] is pair and pair[0] is array and pair[1] is total
    assert not array.any() and not total.any()


class Odd:
    """Tells other attributes than it has."""

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"told": 1}


@pytest.mark.parametrize(
    "other", [nn.Linear(1, 1), threading.Lock(), Odd()], ids=["module", "lock", "odd"]
)
def test_an_object_that_may_be_what_trains_the_model_is_left_alone(other: Any) -> None:
    model = nn.Identity()
    model.trainer = SimpleNamespace(holds=[other], steps=0)
    assert not any(found is model.trainer for found in remembered(model))
    with beside(model):
        model.trainer.steps += 1
    assert model.trainer.steps == 1 and model.trainer.holds == [other]


def test_what_an_object_is_its_type_says() -> None:
    """One that answers slowly, as a configuration of transformers, is not asked at each type."""
    asked = []

    class Slow:
        def __getattribute__(self, name: str) -> Any:
            asked.append(name)
            return object.__getattribute__(self, name)

    model = nn.Linear(1, 1)
    model.config = slow = Slow()
    slow.calls = 0
    asked.clear()
    with beside(model):
        slow.calls += 1
    assert object.__getattribute__(slow, "calls") == 0
    assert "__class__" not in asked


def test_a_class_of_tuples_and_a_shape_are_themselves_inside() -> None:
    model = nn.Identity()
    model.kind, model.shape = Pair, torch.ones(2, 3).shape
    with beside(model):
        assert model.kind is Pair and model.shape == torch.Size([2, 3])


def test_an_array_that_lies_in_a_file_is_not_read(tmp_path: Any) -> None:
    model = nn.Identity()
    model.table = np.memmap(tmp_path / "table", dtype=np.float32, mode="w+", shape=(4,))
    table = model.table
    with beside(model):
        assert model.table is table
