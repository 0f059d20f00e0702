"""A change of parameters that can be made and taken back bit for bit."""

from collections.abc import Mapping
from functools import cached_property
from itertools import count
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.gradients import Vector
from geffect.interrupts import put_back_after, to_the_end
from geffect.layers import trainable
from geffect.places import is_adapter

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as long as others, by their bytes."""

_STANDING: "WeakSet[Change]" = WeakSet()
"""Changes that were made and not taken back."""

_TURNS = count()


class Change:
    """New values of some parameters of a model, beside those that it has.

    - `values`: tensors by canonical name, of `geffect.layers.trainable`, in any float type. They
      are rounded to the type of the parameter. A tied tensor stands under its first name, once.
    - `facts`: what is said of how they were found, for a run file.

    As a context manager it makes the change, and takes it back whatever is raised inside. It keeps
    two copies of the tensors that change: the old and the new values. Later changes of the same
    tensors that stand are taken back before.

    Raises ValueError for names and shapes that the model has not, for values that are not finite,
    and for a model that several processes hold.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> change = Change(model, {"weight": torch.tensor([[1.0, 3.0]])})
    >>> with change:
    ...     model.weight.tolist()
    [[1.0, 3.0]]
    >>> model.weight.tolist(), change.displacement["weight"].tolist(), change.touched
    ([[1.0, 1.0]], [[0.0, 2.0]], {'weight': 1})
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self.parameters = trainable(model)
        self.facts = dict(facts or {})
        check_whole(self.parameters)
        _check_names(values, self.parameters)
        _check_apart(values, self.parameters)
        self._after = {
            name: _as_in(name, values[name], parameter)
            for name, parameter in self.parameters.items()
            if name in values
        }
        self._before = {name: self.parameters[name].detach().clone() for name in self._after}
        self._made = False
        self._turn = -1

    @property
    def space(self) -> str:
        """What is changed: "adapter" where factors of adapters are among it, else "weights"."""
        return "adapter" if any(map(is_adapter, self.parameters)) else "weights"

    @cached_property
    def displacement(self) -> dict[str, Tensor]:
        """D, the new values minus the old ones, in float32 or finer, of the tensors that change.

        It is what the model is moved by, after rounding to its type.
        """
        return {name: difference(after, self._before[name]) for name, after in self._after.items()}

    @property
    def made(self) -> bool:
        """Whether the model has the new values now."""
        return self._made

    @property
    def vector(self) -> Vector:
        """D as a gradient is given: a tensor a parameter, None where nothing changes."""
        return [self.displacement.get(name) for name in self.parameters]

    @cached_property
    def touched(self) -> dict[str, int]:
        """How many numbers of each parameter get other bits; none for one that is not named."""
        return {
            name: int((_bits(after) != _bits(self._before[name])).sum())
            for name, after in self._after.items()
        }

    def apply(self) -> None:
        """Make the change. If it is interrupted, nothing is changed."""
        if self._made:
            return
        now = trainable(self._model)
        for name, before in self._before.items():
            if now.get(name) is not self.parameters[name]:
                raise ValueError(
                    f"The model should have the parameters that the change was made for. Found "
                    f"that `{name}` is another one, or requires no gradient any more. Make another "
                    "change of the model as it is."
                )
            if not torch.equal(_bits(self.parameters[name].detach()), _bits(before)):
                raise ValueError(
                    f"The model should have the parameters that the change was made for. Found "
                    f"that `{name}` has moved since. Make another change of the model as it is."
                )
        self._turn = next(_TURNS)
        _STANDING.add(self)
        try:
            self._made = True
            self._write(self._after)
        except BaseException:
            to_the_end(self.revert)
            raise

    def revert(self) -> None:
        """Give every parameter that was changed its old bits back; may be called at any time.

        Raises ValueError where a later change of one of them stands: it would give back what it
        found, which is this change.
        """
        if self._made:
            for _, name in self._later():
                raise ValueError(
                    "Of several changes of a model the last one should be taken back first. Found "
                    f"that a later one of `{name}` stands. Revert that one, and then this one."
                )
            put_back_after(lambda: None, lambda: self._write(self._before))
            self._made = False

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for later, _ in self._later():
            later.revert()
        self.revert()

    def _later(self) -> "list[tuple[Change, str]]":
        """The changes that stand on this one, the last one first, each with a tensor of both."""
        own = {id(self.parameters[name]) for name in self._before}
        later = [one for one in _STANDING if one.made and one._turn > self._turn]
        found = {
            one: name for one in later for name in one._before if id(one.parameters[name]) in own
        }
        return sorted(found.items(), key=lambda pair: -pair[0]._turn)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)


def check_whole(parameters: Mapping[str, Tensor]) -> None:
    """Refuse a model that several processes train or hold: each would make a change of its own."""
    if distributed.is_of_several(parameters.values()):
        raise ValueError(
            "An edit should be made in one process that holds the whole model. Found several "
            "processes, or parameters in shards. Save the model, and edit what was saved."
        )


def _check_names(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    foreign = sorted(values.keys() - parameters.keys())
    if foreign:
        raise ValueError(
            "An edit should change parameters of the model that require a gradient, by their "
            f"names in `geffect.layers.trainable`. Found {len(foreign)} other names, the first of "
            f"them {foreign[:3]}. Name others, or call requires_grad_() of these parameters."
        )


def _check_apart(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that share their memory: the last one to be written would count."""
    first: dict[tuple[torch.device, int], str] = {}
    spans = {
        name: (parameter.device, parameter.data_ptr())
        for name, parameter in parameters.items()
        if parameter.numel()
    }
    for name, span in spans.items():
        other = first.setdefault(span, name)
        if other != name and (name in values or other in values):
            raise ValueError(
                "The parameters of an edit should each have memory of their own. Found that "
                f"`{name}` and `{other}` share it as two parameters. Tie them as one: assign the "
                "same nn.Parameter to both modules."
            )


def _as_in(name: str, value: Tensor, parameter: Tensor) -> Tensor:
    """The value in the type and at the place of the parameter."""
    if value.shape != parameter.shape:
        raise ValueError(
            f"An edit should give `{name}` values of its shape {tuple(parameter.shape)}. Found "
            f"shape {tuple(value.shape)}. Return a tensor of that shape."
        )
    rounded = value.detach().to(parameter.device, parameter.dtype, copy=True)
    if not rounded.isfinite().all():
        raise ValueError(
            f"An edit should leave finite weights. Found NaN or infinity in `{name}`, of "
            f"{parameter.dtype}. See whether the model and its gradients are finite, or edit less "
            "strongly."
        )
    return rounded


def difference(after: Tensor, before: Tensor) -> Tensor:
    """After minus before, in float32 or finer."""
    # In half precision the difference of two numbers has more digits than either.
    exact = torch.promote_types(after.dtype, torch.float32)
    return after.to(exact) - before.to(exact)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_WORDS[tensor.itemsize])
