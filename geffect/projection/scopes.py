"""How wide a constraint reaches: one for each block of parameters, or one for each coordinate.

Each function changes a space in place and tells what it did. `retain` is r, one tensor a parameter;
`keep` restricts both u and r to the coordinates of a mask, so that a selective step stays selective
after it was projected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect import dots
from geffect.gradients import Rectification, Vector
from geffect.gram import inner, norm

from .elementwise import opposed
from .rules import Rule
from .spaces import Space


def rectify_blocks(
    space: Space,
    retain: Vector,
    keep: Vector | None,
    labels: Sequence[str],
    rule: Rule | None,
) -> Rectification | None:
    """Apply the rule to the Gram matrix of every block; parameters with one label are one block.

    None, and nothing changed, where a gradient is not finite.
    """
    blocks = tuple(dict.fromkeys(labels))
    place = torch.tensor([blocks.index(label) for label in labels])
    before = _summed(space, retain, place)
    if not before.isfinite().all():
        return None
    if keep is not None:
        _stop(space, [None if mask is None else ~mask for mask in keep])
        retain = [_restricted(r, mask) for r, mask in zip(retain, keep, strict=True)]
    weights = _weights(rule, before if keep is None else _summed(space, retain, place))
    changed = weights != torch.tensor([1.0, 0.0])
    for i, (block, r) in enumerate(zip(place.tolist(), retain, strict=True)):
        if changed[block].any() and r is not None and space.direction(i) is not None:
            own, other = weights[block].tolist()
            space.combine(i, own, other, r)
    fired = changed.any(dim=1) | torch.tensor(keep is not None)
    return _report(
        blocks,
        before,
        _summed(space, retain, place) if fired.any() else before,
        coefficient=weights[:, 1],
        fired=fired,
    )


def rectify_coordinates(
    space: Space, retain: Vector, keep: Vector | None, labels: Sequence[str]
) -> Rectification | None:
    """Ask x_i r_i >= 0 of every coordinate: those that u moves against r stay where they are.

    None, and nothing changed, where a gradient is not finite.
    """
    blocks = tuple(dict.fromkeys(labels))
    place = torch.tensor([blocks.index(label) for label in labels])
    before = _summed(space, retain, place)
    if not before.isfinite().all():
        return None
    against: list[Tensor | None] = []
    for i, r in enumerate(retain):
        u = space.direction(i)
        stop = None if u is None or r is None else opposed(u, r)
        mask = None if keep is None else keep[i]
        against.append(stop if mask is None else ~mask if stop is None else stop | ~mask)
    _stop(space, against)
    any_stopped = any(stop is not None and bool(stop.any()) for stop in against)
    return _report(
        blocks,
        before,
        _summed(space, retain, place),
        coefficient=torch.full((len(blocks),), torch.nan),
        fired=torch.full((len(blocks),), any_stopped),
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
            "Guard its divisions; the step was left as it was."
        )
    return weights


def _summed(space: Space, retain: Vector, place: Tensor) -> Tensor:
    """Gram matrices of (u, r) a block; r counts only where the parameter moves."""
    directions = (space.direction(i) for i in range(len(retain)))
    matrices = dots.grams(
        [u, None if u is None else r] for u, r in zip(directions, retain, strict=True)
    )
    return torch.zeros(int(place.max()) + 1, 2, 2, dtype=torch.float64).index_add(
        0, place, matrices
    )


def _stop(space: Space, masks: Vector) -> None:
    for i, mask in enumerate(masks):
        if mask is not None:
            space.stop(i, mask)


def _restricted(r: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return r if r is None or mask is None else r * mask


def _report(
    blocks: tuple[str, ...], before: Tensor, after: Tensor, *, coefficient: Tensor, fired: Tensor
) -> Rectification:
    return Rectification(
        blocks=blocks,
        fired=tuple(fired.double().tolist()),
        coefficient=tuple(coefficient.tolist()),
        inner_before=tuple(inner(before, 0, 1).tolist()),
        inner_after=tuple(inner(after, 0, 1).tolist()),
        norm_before=tuple(norm(before, 0).tolist()),
        norm_after=tuple(norm(after, 0).tolist()),
        retain_norm=tuple(norm(before, 1).tolist()),
    )
