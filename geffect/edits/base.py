"""What an edit is: from a model and data to new values of its parameters, without training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from geffect.layers import canonical_name, trainable
from geffect.places import is_adapter

from .change import Change, check_whole

Data = Mapping[str, Any]
"""What an edit is made from, by name: batches of its `sets`, and its `states`."""

State = nn.Module | Mapping[str, Tensor]
"""The parameters of another model: the model, or its tensors by name."""


@dataclass(frozen=True)
class Outcome:
    """New values of the tensors that an edit changes, by canonical name, and what is said of it."""

    values: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit(ABC):
    """A change of a model's parameters that is computed at once, instead of by training.

    A frozen dataclass, whose fields are its options. It is profiled like a step of training, by
    its displacement D: e_R(D) = -<grad R, D> is how much a risk R falls, to first order. What an
    edit is made from it says by attributes of its class:

    - `sets`: the sets of batches that it needs, such as "forget".
    - `states`: the other models that it needs, such as "tuned".
    - `source`: where its formula is from.

    An edit of one's own says what the new values are:

    >>> @dataclass(frozen=True)
    ... class Shrink(Edit):
    ...     factor: float = 0.5
    ...     def outcome(self, model, data):
    ...         return Outcome({n: self.factor * p.detach() for n, p in trainable(model).items()})
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> Shrink().displacement(model, {})
    {'weight': tensor([[-0.5000]])}
    >>> with Shrink().change(model, {}):
    ...     model.weight.item()
    0.5
    >>> model.weight.item()
    1.0
    """

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of batches that are needed."""
        return ()

    @property
    def states(self) -> tuple[str, ...]:
        """The parameters of other models that are needed."""
        return ()

    @property
    def source(self) -> str:
        """Where the formula is from."""
        return ""

    @abstractmethod
    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        """The new values, of a model and data that were checked; the model stays as it is."""

    def varied(self, option: str, model: nn.Module, data: Data) -> Callable[[float], Outcome]:
        """The new values at each value of an option; what does not depend on it is found once."""
        return lambda value: self.with_option(option, value).outcome(model, data)

    def with_option(self, option: str, value: Any) -> Self:
        """The same edit with another value of one of its options."""
        return replace(self, **{option: value})

    def change(self, model: nn.Module, data: Data) -> Change:
        """The change of this model, not made yet: a context manager, with `apply` and `revert`."""
        check_whole(trainable(model))
        check_given(self, data)
        outcome = self.outcome(model, data)
        return Change(model, outcome.values, outcome.facts)

    def displacement(self, model: nn.Module, data: Data) -> dict[str, Tensor]:
        """D by canonical name, of the tensors that change; the model stays as it is."""
        return self.change(model, data).displacement

    def apply(self, model: nn.Module, data: Data) -> Change:
        """The change, made; its `revert` gives every bit back."""
        change = self.change(model, data)
        change.apply()
        return change


def check_given(edit: Edit, data: Data) -> None:
    """Refuse data without what an edit is made from.

    >>> from geffect.edits import SSD
    >>> check_given(SSD(), {"forget": []})
    Traceback (most recent call last):
    ValueError: SSD should be given `forget`, `retain`. Found `forget`. Pass `retain` as well: ...
    """
    needed = (*edit.sets, *edit.states)
    absent = [name for name in needed if data.get(name) is None]
    if absent:
        found = ", ".join(f"`{name}`" for name in data if data[name] is not None) or "nothing"
        kinds = dict.fromkeys(edit.sets, "batches") | dict.fromkeys(edit.states, "a model")
        raise ValueError(
            f"{type(edit).__name__} should be given {', '.join(f'`{name}`' for name in needed)}. "
            f"Found {found}. Pass "
            + " and ".join(f"`{name}` as well: {kinds[name]}" for name in absent)
            + "."
        )


def state_of(name: str, given: State, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of another model that stand for the parameters of this one, by their names.

    Raises ValueError for a model that lacks some of them, has them in other shapes, or differs in
    what an edit does not change: buffers, and parameters without a gradient.
    """
    parameters = trainable(model)
    if not isinstance(given, nn.Module | Mapping):
        raise TypeError(
            f"`{name}` should be a model, or its tensors by name. Found `{type(given).__name__}`. "
            "Load the model, and pass it."
        )
    whole = given.state_dict() if isinstance(given, nn.Module) else given
    found: dict[str, Tensor] = {}
    for path, tensor in whole.items():
        found.setdefault(canonical_name(path), tensor.detach())
    should = f"`{name}` should have the parameters of the model that is edited. Found"
    absent = [key for key in parameters if key not in found]
    if absent:
        raise ValueError(
            f"{should} {len(absent)} that it lacks, the first of them {absent[:3]}. Pass a model "
            "of the same architecture; of adapters, either both or neither merged."
        )
    beside = sorted(filter(is_adapter, found.keys() - parameters.keys()))
    if beside:  # its weights are those of its base, under the same names
        raise ValueError(
            f"{should} adapters beside them, `{beside[0]}` the first. Merge them before, by "
            "`merge_and_unload()`; on the command line with --merge."
        )
    own = model.state_dict()
    foreign = sorted(found.keys() - set(map(canonical_name, own)))
    if foreign:
        raise ValueError(
            f"{should} {len(foreign)} tensors beside them, the first of them {foreign[:3]}. Pass "
            "a model of the same architecture."
        )
    first = {parameter.data_ptr(): key for key, parameter in parameters.items()}
    for path, tensor in own.items():
        key = canonical_name(path)
        if key not in found:
            continue
        other = found[key]
        if other.shape != tensor.shape:
            raise ValueError(
                f"{should} `{key}` of shape {tuple(other.shape)}, not {tuple(tensor.shape)}. Pass "
                "a model of the same architecture."
            )
        tied = first.get(tensor.data_ptr())
        if tied is not None and not torch.equal(other, found[tied]):
            raise ValueError(
                f"{should} `{key}` apart from `{tied}`, which are one tensor here. Pass a model "
                "that ties them as well, or untie both."
            )
        if tied is None and not torch.equal(other.to(tensor), tensor):
            raise ValueError(
                f"`{name}` should differ from the model that is edited in parameters that require "
                f"a gradient alone. Found that `{key}` differs, which no edit changes. Call "
                "requires_grad_() of it if it is a parameter."
            )
    return {key: found[key].to(parameter.device) for key, parameter in parameters.items()}
