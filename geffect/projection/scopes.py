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
from geffect.gram import combined, inner, norm

from .elementwise import opposed
from .rules import Rule
from .spaces import Space


def rectify_blocks(
    space: Space,
    retain: Vector,
    keep: Vector | None,
    labels: Sequence[str],
    rule: Rule | None,
) -> Rectification:
    """Apply the rule to the Gram matrix of every block; parameters with one label are one block."""
    blocks = tuple(dict.fromkeys(labels))
    place = torch.tensor([blocks.index(label) for label in labels])
    before = _summed(_matrices(space, retain), place, len(blocks))
    if not before.isfinite().all():
        return skipped(blocks)
    matrices = before
    if keep is not None:
        _stop(space, [None if mask is None else ~mask for mask in keep])
        retain = [_restricted(r, mask) for r, mask in zip(retain, keep, strict=True)]
        matrices = _summed(_matrices(space, retain), place, len(blocks))
    weights = torch.tensor([1.0, 0.0]).double().expand(len(blocks), 2)
    if rule is not None:
        weights = rule(matrices)
        for i, (block, r) in enumerate(zip(place.tolist(), retain, strict=True)):
            own, other = weights[block].tolist()
            if r is not None and (own, other) != (1.0, 0.0) and space.direction(i) is not None:
                space.combine(i, own, other, r)
    change = torch.stack([weights, torch.tensor([0.0, 1.0]).expand_as(weights)], dim=-2)
    return _report(
        blocks,
        before,
        combined(matrices, change),
        coefficient=weights[:, 1],
        fired=(weights != torch.tensor([1.0, 0.0])).any(dim=1) | torch.tensor(keep is not None),
    )


def rectify_coordinates(space: Space, retain: Vector, keep: Vector | None) -> Rectification:
    """Ask x_i r_i >= 0 of every coordinate: those that u moves against r stay where they are."""
    everything = ("model",)
    place = torch.zeros(len(retain), dtype=torch.long)
    before = _summed(_matrices(space, retain), place, 1)
    if not before.isfinite().all():
        return skipped(everything)
    against: list[Tensor | None] = []
    for i, r in enumerate(retain):
        u = space.direction(i)
        stop = None if u is None or r is None else opposed(u, r)
        mask = None if keep is None else keep[i]
        against.append(stop if mask is None else ~mask if stop is None else stop | ~mask)
    _stop(space, against)
    return _report(
        everything,
        before,
        _summed(_matrices(space, retain), place, 1),
        coefficient=torch.tensor([torch.nan]),
        fired=torch.tensor([any(stop is not None and bool(stop.any()) for stop in against)]),
    )


def skipped(blocks: tuple[str, ...]) -> Rectification:
    """The report of a step that was left alone because a gradient was zero or not finite."""
    nothing, unknown = (0.0,) * len(blocks), (float("nan"),) * len(blocks)
    return Rectification(blocks, nothing, nothing, *[unknown] * 5)


def _matrices(space: Space, retain: Vector) -> Tensor:
    """Gram matrices of (u, r) a parameter; r counts only where the parameter moves."""
    matrices = []
    for i, r in enumerate(retain):
        u = space.direction(i)
        matrices.append(dots.gram([u, None if u is None else r]).cpu())
    return torch.stack(matrices)


def _summed(matrices: Tensor, place: Tensor, count: int) -> Tensor:
    return torch.zeros(count, 2, 2, dtype=torch.float64).index_add(0, place, matrices)


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
        # Rounding may leave the square of a norm that should be zero a hair below it.
        norm_after=tuple(inner(after, 0, 0).clamp(min=0).sqrt().tolist()),
        retain_norm=tuple(norm(before, 1).tolist()),
    )
