"""Towers: the parts of a network that have layers of their own, such as one for images."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

from .names import Path, Spot
from .words import EMBEDDING, PROJECTOR, said

MODEL = "model"

_OF_TOWER = re.compile(
    r"(.+?) (?:(?:layers? \d|embedding|final norm|pooler|head|other).*|shallow|middle|deep)"
)
_INPUT_SIDE, _OUTPUT_SIDE = ("text", "encoder"), ("text", "decoder")
_RANKS: dict[str | None, int] = {
    **dict.fromkeys(("vision", "audio", "backbone", "encoder"), 0),
    **dict.fromkeys(("text", "decoder"), 2),
}


def homes(every: Sequence[Spot]) -> tuple[list[str], list[bool]]:
    """The tower of each tensor, and whether it stands inside of it.

    Lists of modules that stand side by side are one tower; lists that different modules hold are
    towers, and so is what a word says is one. The tower of a model that has but one is "model".
    What is outside of all towers goes with that of the input, or of the output: the one that is
    called so, or else the first, and the largest.
    """
    real = _with_words(every)
    structural = _without_words(every, real)
    inside = [_inside(spot, real, structural) for spot in every]
    known = [tower for tower in dict.fromkeys(inside) if tower not in (None, PROJECTOR)]
    if len(known) < 2:
        return [PROJECTOR if tower == PROJECTOR else MODEL for tower in inside], [True] * len(every)
    first = next((tower for tower in _INPUT_SIDE if tower in known), known[0])
    sizes = Counter(inside)
    largest = max(reversed(known), key=sizes.__getitem__)
    last = next((tower for tower in _OUTPUT_SIDE if tower in known), largest)
    towers = [
        tower or (first if spot.said.part == EMBEDDING else last) or MODEL
        for spot, tower in zip(every, inside, strict=True)
    ]
    return towers, [tower is not None for tower in inside]


def tower_order(towers: Iterable[str]) -> dict[str, int]:
    """The places of towers from input to output: encoders, others and projectors, decoders.

    >>> tower_order(["text", "projector", "vision"])
    {'vision': 0, 'projector': 1, 'text': 2}
    """
    names = list(dict.fromkeys(towers))
    ranks = {tower: -1 if "+" in tower else _rank(tower) for tower in names}
    return {tower: i for i, tower in enumerate(sorted(names, key=ranks.__getitem__))}


def _rank(tower: str) -> int:
    words = tower.split()[-1], said([tower.replace(" ", "_")]).tower
    return next((_RANKS[word] for word in words if word in _RANKS), 1)


def tower_in(label: str) -> str:
    """The tower that the label of a layer or of a depth group begins with; "model" for none.

    >>> tower_in("vision layer 3"), tower_in("layer 3"), tower_in("projector")
    ('vision', 'model', 'projector')
    """
    if label.startswith(PROJECTOR):
        return PROJECTOR
    found = _OF_TOWER.fullmatch(label)
    return found[1] if found else MODEL


def _with_words(every: Sequence[Spot]) -> dict[Path, str]:
    """The towers that are called so, by their modules, if they hold more than one module."""
    held: dict[tuple[Path, str], set[Path]] = {}
    for spot in every:
        if (tower := spot.said.tower) is not None:
            scope = (spot.path[: spot.said.depth], tower)
            # A layer is a module below; a projector may be a single one.
            further = {(*spot.path, "")} if spot.unit >= 0 or tower == PROJECTOR else set()
            held.setdefault(scope, set()).update({spot.path, *further})
    real = {path: tower for (path, tower), paths in held.items() if len(paths) > 1}
    # One word may name several, such as an encoder and a decoder of text.
    for named in (lambda path: path[-1].lower().replace("_", " "), ".".join):
        count = Counter(tower for tower in real.values() if tower != PROJECTOR)
        real = {path: named(path) if count[t] > 1 else t for path, t in real.items()}
    return real


def _without_words(every: Sequence[Spot], real: dict[Path, str]) -> dict[Path, str]:
    """The modules that hold the other lists, and what to call them; the longest path first."""
    listed = [spot for spot in every if spot.in_stack]
    deep = [spot for spot in listed if not spot.is_leaf]  # a few layers on top make no tower
    scopes = {_holder(spot) for spot in deep or listed if _word(spot, real) is None}
    outer = [one for one in scopes if not any(_above(other, one) for other in scopes)]
    words = {spot.said.tower for spot in every if _word(spot, real) is not None}
    if len(outer) == 1 and "text" not in words and not words.isdisjoint({"vision", "audio"}):
        return {outer[0]: "text"}
    count = Counter(scope[-1:] for scope in outer)
    return {
        scope: ".".join(scope if count[scope[-1:]] > 1 else scope[-1:]) or MODEL
        for scope in sorted(outer, key=len, reverse=True)
    }


def _holder(spot: Spot) -> Path:
    """The module that holds the list, or the list of lists."""
    return tuple(takewhile(lambda module: not module.isdigit(), spot.path))[:-1]


def _above(other: Path, scope: Path) -> bool:
    return other != scope and other == scope[: len(other)]


def _word(spot: Spot, real: dict[Path, str]) -> str | None:
    return None if spot.said.tower is None else real.get(spot.path[: spot.said.depth])


def _inside(spot: Spot, real: dict[Path, str], structural: dict[Path, str]) -> str | None:
    if (tower := _word(spot, real)) is not None:
        return tower
    return next((structural[s] for s in structural if spot.path[: len(s)] == s), None)
