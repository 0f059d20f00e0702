"""Mixtures of experts: which tensors are experts, which route to them, and how many one holds."""

import re
from collections.abc import Mapping, Sequence

from .adapters import is_adapter
from .names import Path, Spot

EXPERT, SHARED_EXPERT, ROUTER = "expert", "shared expert", "router"

_ROUTER = re.compile(r"gate|gating|wg|\w*router\w*|shared_experts?_gate")
_SHARED = re.compile(r"shared_(?:experts?|mlp)")
_EXPERTS = re.compile(r"(?:\w+_)?experts")
_NUMBERED = re.compile(r"experts\.(?:expert_)?(\d+)(?=\.|$)")


def expert_of(name: str) -> int:
    """Which expert a tensor is of, where each has tensors of its own; else -1.

    >>> expert_of("layers.0.mlp.experts.3.w1.weight"), expert_of("layers.0.mlp.gate.weight")
    (3, -1)
    """
    found = _NUMBERED.search(name)
    return int(found[1]) if found else -1


def roles(every: Sequence[Spot]) -> list[tuple[str, int]]:
    """What each tensor is to a mixture of experts, and of how many experts it is made.

    A mixture is a module with a part that is called so, or with a router and a tensor of three
    dimensions, the first as long as the router's.
    """
    mixtures = _mixtures(every)
    return [_role(spot, mixtures) for spot in every]


def _mixtures(every: Sequence[Spot]) -> dict[Path, int]:
    """The modules that hold experts, and how many: 0 where nothing tells."""
    called = {spot.path[:i] for spot in every if (i := _first(_EXPERTS, spot.path)) >= 0}
    routed: dict[Path, int] = {}
    fused: dict[Path, set[int]] = {}
    for spot in every:
        router = _first(_ROUTER, spot.path)
        if router >= 0 and spot.is_matrix and not spot.path[router].startswith("shared"):
            routed[spot.path[:router]] = max(spot.shape[0], routed.get(spot.path[:router], 0))
        if len(spot.shape) == 3:
            for i in range(len(spot.path) + 1):
                fused.setdefault(spot.path[:i], set()).add(spot.shape[0])
    found = called | {holder for holder, many in routed.items() if many in fused.get(holder, ())}
    alone = {holder: next(iter(many)) for holder, many in fused.items() if len(many) == 1}
    return {holder: routed.get(holder, alone.get(holder, 0)) for holder in found}


def _role(spot: Spot, mixtures: Mapping[Path, int]) -> tuple[str, int]:
    held = [i for i in range(len(spot.path) + 1) if spot.path[:i] in mixtures]
    if not held:
        return "", 0
    many = mixtures[spot.path[: held[-1]]]
    module = spot.path[held[-1]] if held[-1] < len(spot.path) else ""
    if _ROUTER.fullmatch(module):
        return ROUTER, 0
    if _SHARED.fullmatch(module):
        return SHARED_EXPERT, 0
    leads = bool(many) and bool(spot.shape) and spot.shape[0] == many
    if not (_EXPERTS.fullmatch(module) or (leads and len(spot.shape) == 3)):
        return "", 0
    rows = leads or (bool(many) and len(spot.shape) == 2 and spot.shape[0] % many == 0)
    whole = expert_of(spot.name) < 0 and not is_adapter(spot.name)
    return EXPERT, many if rows and whole else 0


def _first(pattern: re.Pattern[str], path: Path) -> int:
    return next((i for i, module in enumerate(path) if pattern.fullmatch(module)), -1)
