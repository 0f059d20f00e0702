"""How wide a constraint reaches: one for each block of parameters, or one for each coordinate.

Each function changes a space in place and tells what it did. `retain` is r, one tensor a parameter;
`keep` restricts both u and r to the coordinates of a mask, so that a selective step stays selective
after it was projected.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from geffect import dots
from geffect.gradients import Rectification, Vector
from geffect.gram import inner, norm

from .elementwise import opposed
from .rules import Rule
from .spaces import Space


@dataclass(frozen=True)
class Blocks:
    """Which parameters share a constraint: the names of the blocks, and the one of each parameter.

    >>> Blocks.of(["head", "layer 0", "head"])
    Blocks(names=('head', 'layer 0'), place=(0, 1, 0))
    """

    names: tuple[str, ...]
    place: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Self:
        """Parameters with one label are one block."""
        names = tuple(dict.fromkeys(labels))
        return cls(names, tuple(map(names.index, labels)))


def rectify_blocks(
    space: Space, retain: Vector, keep: Vector | None, blocks: Blocks, rule: Rule | None
) -> Rectification | None:
    """Apply the rule to the Gram matrix of every block.

    None, and nothing changed, where a gradient is not finite.
    """
    before = _gram(space, retain, None, blocks)
    if not before.isfinite().all():
        return None
    # The rule is asked before anything is changed: it may refuse.
    weights = _weights(rule, before if keep is None else _gram(space, retain, keep, blocks))
    changed = weights != torch.tensor([1.0, 0.0])
    if keep is not None:
        _stop(space, [None if mask is None else ~mask for mask in keep])
        retain = [_restricted(r, mask) for r, mask in zip(retain, keep, strict=True)]
    for i, (block, r) in enumerate(zip(blocks.place, retain, strict=True)):
        if changed[block].any() and r is not None and space.direction(i) is not None:
            own, other = weights[block].tolist()
            space.combine(i, own, other, r)
    fired = changed.any(dim=1) | torch.tensor(keep is not None)
    after = _gram(space, retain, None, blocks) if fired.any() else before
    return _report(blocks, before, after, coefficient=weights[:, 1], fired=fired)


def rectify_coordinates(
    space: Space, retain: Vector, keep: Vector | None, blocks: Blocks
) -> Rectification | None:
    """Ask x_i r_i >= 0 of every coordinate: those that u moves against r stay where they are.

    None, and nothing changed, where a gradient is not finite.
    """
    before = _gram(space, retain, None, blocks)
    if not before.isfinite().all():
        return None
    against: list[Tensor | None] = []
    for i, r in enumerate(retain):
        u = space.direction(i)
        stop = None if u is None or r is None else opposed(u, r)
        mask = None if keep is None else keep[i]
        against.append(stop if mask is None else ~mask if stop is None else stop | ~mask)
    _stop(space, against)
    stopped = any(stop is not None and bool(stop.any()) for stop in against)
    count = len(blocks.names)
    return _report(
        blocks,
        before,
        _gram(space, retain, None, blocks),
        coefficient=torch.full((count,), torch.nan),
        fired=torch.full((count,), stopped),
    )


def skipped(blocks: tuple[str, ...]) -> Rectification:
    """The report of a step that was left alone because a gradient was zero or not finite."""
    nothing, unknown = (0.0,) * len(blocks), (float("nan"),) * len(blocks)
    return Rectification(blocks, nothing, nothing, *[unknown] * 5)


def _weights(rule: Rule | None, K: Tensor) -> Tensor:
    """The weights of (u, r) in every block; (1, 0) where there is no rule, or no r to ask it of."""
    untouched = torch.tensor([1.0, 0.0], dtype=K.dtype).expand(len(K), 2)
    if rule is None:
        return untouched
    asked = inner(K, 1, 1) > 0
    weights = torch.where(asked[:, None], rule(K), untouched)
    if not weights.isfinite().all():
        raise ValueError(
            f"A rule should give finite weights. Found {weights.tolist()} from {rule!r}. "
            "Guard its divisions; nothing was changed, and a step in update space was taken back."
        )
    return weights


def _gram(space: Space, retain: Vector, keep: Vector | None, blocks: Blocks) -> Tensor:
    """Gram matrices of (u, r) a block, of the kept coordinates of what moves."""
    summed = torch.zeros(len(blocks.names), 2, 2, dtype=torch.float64)
    matrices = dots.grams(_pairs(space, retain, keep))
    return summed.index_add(0, torch.tensor(blocks.place), matrices)


def _pairs(space: Space, retain: Vector, keep: Vector | None) -> Iterator[list[Tensor | None]]:
    """(u, r) of one parameter after the other: in update space each u is made for the moment."""
    for i, r in enumerate(retain):
        mask = None if keep is None else keep[i]
        u = _restricted(space.direction(i), mask)
        yield [u, None if u is None else _restricted(r, mask)]


def _stop(space: Space, masks: Vector) -> None:
    for i, mask in enumerate(masks):
        if mask is not None:
            space.stop(i, mask)


def _restricted(vector: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return vector if vector is None or mask is None else vector * mask


def _report(
    blocks: Blocks, before: Tensor, after: Tensor, *, coefficient: Tensor, fired: Tensor
) -> Rectification:
    return Rectification(
        blocks=blocks.names,
        fired=tuple(fired.double().tolist()),
        coefficient=tuple(coefficient.tolist()),
        inner_before=tuple(inner(before, 0, 1).tolist()),
        inner_after=tuple(inner(after, 0, 1).tolist()),
        norm_before=tuple(norm(before, 0).tolist()),
        norm_after=tuple(norm(after, 0).tolist()),
        retain_norm=tuple(norm(before, 1).tolist()),
    )
