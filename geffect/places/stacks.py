"""Stacks: the lists of modules of a tower, which are its layers, and what is around them."""

from collections.abc import Sequence

from .names import Path, Spot
from .words import EMBEDDING, FINAL_NORM, HEAD, OTHER, PROJECTOR

LAYER = "layer"


def parts(tower: str, members: Sequence[Spot]) -> dict[str, tuple[str, int]]:
    """The part of the tower that each of its tensors belongs to, and the index of its layer.

    Lists are counted one after another. A tower without lists has its modules as layers, in their
    order. What has neither a list nor a word is before the layers or after them; what belongs to no
    module but the one that holds the layers is "other".
    """
    stacks = _stacks(tower, members)
    index = _indices(stacks)
    if not stacks and tower != PROJECTOR:
        # Without lists, a norm is of the module before it.
        own = (None, FINAL_NORM)
        index = _in_order([s for s in members if s.said.part in own and not s.in_stage])
    begin = next((i for i, spot in enumerate(members) if spot.name in index), len(members))
    matrices = {spot.path for spot in members if spot.is_matrix}
    found: dict[str, tuple[str, int]] = {}
    last = 0
    for i, spot in enumerate(members):
        if spot.name in index or spot.in_stage:
            last = index.get(spot.name, last)
            found[spot.name] = LAYER, last
        else:
            after = HEAD if spot.path in matrices else FINAL_NORM
            fallback = OTHER if _holds(spot, stacks) else EMBEDDING if i < begin else after
            found[spot.name] = PROJECTOR if tower == PROJECTOR else spot.said.part or fallback, -1
    return found


def _stacks(tower: str, members: Sequence[Spot]) -> dict[Path, list[Spot]]:
    """The lists. Those of single modules count where there are no others, such as in a CNN."""
    stacks: dict[Path, list[Spot]] = {}
    for spot in members:
        if spot.in_stack:
            stacks.setdefault(spot.stack, []).append(spot)
    deep = {path: own for path, own in stacks.items() if not all(spot.is_leaf for spot in own)}
    return deep if deep or tower == PROJECTOR else stacks


def _indices(stacks: dict[Path, list[Spot]]) -> dict[str, int]:
    index: dict[str, int] = {}
    for own in stacks.values():
        offset = 1 + max(index.values(), default=-1)
        if all(spot.is_leaf for spot in own):
            found = _in_order(sorted(own, key=lambda spot: spot.number))
        else:
            found = {spot.name: spot.number for spot in own}
        index |= {name: offset + place for name, place in found.items()}
    return index


def _in_order(members: Sequence[Spot]) -> dict[str, int]:
    """A layer for every module with a matrix; one that has none, such as a norm, joins the last."""
    keys = {spot.name: spot.path or (spot.name,) for spot in members}
    matrices = {keys[spot.name] for spot in members if spot.is_matrix} or {*keys.values()}
    index: dict[Path, int] = {}
    count = 0
    for key in dict.fromkeys(keys.values()):
        count += key in matrices
        index[key] = max(count - 1, 0)
    return {name: index[key] for name, key in keys.items()}


def _holds(spot: Spot, stacks: dict[Path, list[Spot]]) -> bool:
    return any(spot.path == stack[: len(spot.path)] for stack in stacks)
