"""What the modules of a model remember beside their parameters and buffers."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect.codes import FLOATS, holds_codes

_NAMES_AND_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_FIXED: tuple[type, ...] = (
    *(*_NAMES_AND_NUMBERS, Enum, frozenset, range, slice, PurePath, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(type, FunctionType, BuiltinFunctionType, MethodType),
)
"""What nothing changes in place, or is not asked what it holds."""

_DICTS = (Counter, OrderedDict, defaultdict, dict)
_ADD: dict[type, Callable[[Any, Mapping[Any, Any]], object]] = {
    **dict.fromkeys(_DICTS, dict.update),
    list: lambda container, members: list.extend(container, members.values()),
    deque: lambda container, members: deque.extend(container, members.values()),
    set: lambda container, members: set.update(container, members.values()),
}
"""How containers take members in. Those of a class of their own do it as what they derive from."""

_NOTE: dict[type, Callable[[Any], Callable[[], object]]] = {
    torch.Generator: lambda drawn: partial(drawn.set_state, drawn.get_state()),
    random.Random: lambda drawn: partial(drawn.setstate, drawn.getstate()),
    np.random.RandomState: lambda drawn: partial(drawn.set_state, drawn.get_state()),
    np.random.Generator: lambda drawn: partial(
        setattr, drawn.bit_generator, "state", copy.deepcopy(drawn.bit_generator.state)
    ),
}
"""How what draws random numbers is noted, and put back."""

# What something is, its type says: `isinstance` asks the object too, at each type that it is not,
# and a configuration of transformers answers slowly.
_FILLED = (*_ADD,)
_CONTAINERS = (*_ADD, tuple)
_DATA: tuple[type, ...] = (*_FIXED, Tensor, np.ndarray, bytearray, *_CONTAINERS)
_OF_TORCH = frozenset(name for name, x in vars(nn.Module()).items() if isinstance(x, (dict, set)))

Holder = tuple[Callable[[Mapping[Any, Any]], None], dict[Any, Any]]
"""What lets something hold members, and nothing else, and the members that it holds."""


def remembered(model: nn.Module) -> list[Any]:
    """The modules, and the containers, objects and generators that they hold, each once.

    Of objects those that hold nothing but what can be put back, as one that counts, has a schedule
    or keeps keys and values. One that holds a module, a lock or a file is left alone, as it may be
    what trains the model; and so is what classes and closures keep.

    >>> model = nn.Identity()
    >>> model.past = {"seen": []}
    >>> remembered(model)
    [Identity(), {'seen': []}, []]
    """
    found: dict[int, Any] = {id(module): module for module in model.modules()}
    waiting = [x for module in found.values() for x in _inside(module) or []]
    alone: set[int] = set()
    while waiting:
        value = waiting.pop()
        if issubclass(type(value), _FIXED) or id(value) in found or id(value) in alone:
            continue
        if issubclass(type(value), _CONTAINERS):  # each member is asked for itself
            found[id(value)] = value
            waiting += _inside(value) or []
        else:
            found.update(_state(value))
            alone.add(id(value))
    return [*found.values()]


def holders(of: Iterable[Any]) -> Iterator[Holder]:
    """What holds members: modules and objects their attributes, containers what is in them."""
    for value in of:
        if issubclass(type(value), _FILLED):
            yield partial(_fill, value), _members(value)
        attributes = _attributes(value)
        if attributes is not None:
            yield partial(_assign, value), attributes


def generators(of: Iterable[Any]) -> Iterator[Callable[[], object]]:
    """What lets each that draws random numbers go on from where it is now."""
    return (_NOTE[type(value)](value) for value in of if type(value) in _NOTE)


def copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of what is changed in place, one and the same wherever it is held.

    A tensor that is trained is none, and a container has members that are. A tuple has copies.
    """
    if id(value) in copies:
        return copies[id(value)]
    own = value
    if issubclass(type(value), Tensor):
        if not (value.requires_grad or isinstance(value, nn.Parameter)):
            own = value.detach().clone()
    elif type(value) in (np.ndarray, bytearray):
        own = value.copy()
    elif type(value) is tuple or hasattr(type(value), "_make"):
        members = [copied(x, copies) for x in value]
        if any(a is not b for a, b in zip(members, value, strict=True)):
            own = tuple(members) if type(value) is tuple else value._make(members)
    return copies.setdefault(id(value), own)


def _state(value: Any) -> dict[int, Any]:
    """An object and all in it, by their numbers; nothing if not all of it can be put back."""
    found: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if issubclass(type(part), (*_FIXED, Tensor)) or id(part) in found:
            continue
        inside = None if issubclass(type(part), nn.Module) else _inside(part)
        if inside is None:
            return {}
        found[id(part)] = part
        waiting += inside
    return found


def _inside(value: Any) -> list[Any] | None:
    """What is in a container, an object or a tuple; None where that is not known."""
    if type(value) in (np.ndarray, bytearray, *_NOTE):
        return []
    attributes = _attributes(value)
    if issubclass(type(value), _CONTAINERS):
        members = value if issubclass(type(value), tuple) else _members(value).values()
        return [*members, *(attributes or {}).values()]
    return None if attributes is None else [*attributes.values()]


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a module or an object, also those in slots; None where it has none.

    A module whose weights are codes has objects beside them, which a first forward makes ready for
    good: these are left alone.
    """
    if issubclass(type(value), nn.Module):
        own = {name: x for name, x in vars(value).items() if name not in _OF_TORCH}
        objects = [name for name, x in own.items() if not issubclass(type(x), _DATA)]
        if objects and _has_codes(value):
            for name in objects:
                del own[name]
        return own
    of_object, slots = _dict_of(value), _slots(value)
    return None if of_object is None and not slots else {**(of_object or {}), **slots}


def _has_codes(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    return any(holds_codes(p) or p.dtype not in FLOATS for p in own)


def _dict_of(value: Any) -> dict[str, Any] | None:
    own = getattr(value, "__dict__", None)
    # One that is made when it is asked for does not hold what it tells.
    return own if type(own) is dict and own is value.__dict__ else None


def _slots(value: Any) -> dict[str, Any]:
    state = object.__getstate__(value)
    return state[1] if isinstance(state, tuple) else {}


def _assign(owner: Any, attributes: Mapping[str, Any]) -> None:
    """Let a module or an object have these attributes and no further ones."""
    now = _attributes(owner) or {}
    if _same(now, attributes):
        return
    own, slots = _dict_of(owner), _slots(owner)
    for name in now.keys() - attributes.keys():
        object.__delattr__(owner, name) if name in slots else (own or {}).pop(name)
    for name, value in attributes.items():
        if isinstance(getattr(type(owner), name, None), MemberDescriptorType):
            object.__setattr__(owner, name, value)
        elif own is not None:
            own[name] = value


def _same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether both hold the very same, by the very same keys and in the same order."""
    if len(one) != len(other):
        return False
    pairs = zip(one.items(), other.items(), strict=True)
    return all(a is b and x is y for (a, x), (b, y) in pairs)


def _members(container: Any) -> dict[Any, Any]:
    """What a container holds, by its keys or places."""
    kind = _kind(container)
    return dict(dict.items(container) if kind in _DICTS else enumerate(kind.__iter__(container)))


def _fill(container: Any, members: Mapping[Any, Any]) -> None:
    """Let a container, which stays the same one, hold these and nothing else.

    It is not touched where it does, since a set that is filled anew may have another order.
    """
    if not _same(_members(container), members):
        kind = _kind(container)
        kind.clear(container)
        _ADD[kind](container, members)


def _kind(container: Any) -> Any:
    return next(kind for kind in type(container).__mro__ if kind in _ADD)
