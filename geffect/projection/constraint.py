"""One constraint for each block of parameters, kept by a rule on the block's Gram matrix.

What is said of a step is said of the Gram matrix of its direction u and of the averages r_1 ... r_m
of the retain gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from geffect.gradients import Rectification
from geffect.gram import norm

from . import fused
from .blocks import Blocks, GramAccumulator, Vectors, held, parts
from .masks import Mask
from .reports import reported
from .rounding import enlarged, harms
from .rules import Rule
from .spaces import Space, widened

Retain = Callable[[int], Vectors]
"""The averages of a parameter's retain gradients, one a retain set."""

Metric = Callable[[int], Tensor | None]
"""The scale of the retain gradients' coordinates, where distances are measured in it."""


@dataclass(frozen=True)
class Terms:
    """What a constraint is about: the averages, the coordinates that may move, and the metric."""

    retain: Retain
    mask: Mask | None
    metric: Metric | None

    def of(self, i: int) -> tuple[Vectors, Tensor | None, Tensor | None]:
        """The averages of a parameter, its coordinates that may move, and its scale."""
        kept = None if self.mask is None else self.mask(i)
        return held(self.retain(i)), kept, None if self.metric is None else self.metric(i)

    def slices(self, k: int) -> tuple[slice, slice, slice]:
        """Where u and the averages stand in a Gram matrix, seen in three ways.

        As they are, as a rule is asked about them, and as its weights go to them.
        """
        seen = slice(0, k)
        asked = slice(k, 2 * k) if self.ways > 1 else seen
        return seen, asked, slice(2 * k, 3 * k) if self.ways > 2 else asked

    @property
    def ways(self) -> int:
        """How many of these are different."""
        return 3 if self.metric is not None else 2 if self.mask is not None else 1


PendingRectification = Callable[[], Rectification]
"""What was done, added up over the processes when it is asked for."""


@dataclass(frozen=True)
class Change:
    """What is to be done to a space, which is not changed before `make`, and what is said of it.

    Where `make` is interrupted it may be called again, to the same end.
    """

    make: Callable[[], None]
    report: PendingRectification
    unmet: str | None = None  # why the step is not what its rule promises, if it is not


class Constraint:
    """One constraint for each block, kept by a rule on the Gram matrix of the block."""

    def __init__(
        self,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        sets: Sequence[str],
        rule: Rule,
        *,
        count: int,
    ) -> None:
        self._blocks, self._parameters, self._sets, self._rule = blocks, parameters, sets, rule
        self._count = count  # of retain gradients: those of the sets, of which is told, come first

    def planned(self, space: Space, terms: Terms) -> Change | None:
        """What keeps it; None where a gradient is not finite."""
        seen, asked, added = terms.slices(1 + self._count)
        told = slice(0, len(self._sets))
        K = self._gram(space, terms, size=added.stop)
        if not K[:, seen, seen].isfinite().all():
            return None
        # The rule is asked before anything is changed: it may refuse.
        weights = self._weights(K[:, asked, asked])
        promise = self._rule.promise
        unmet = torch.zeros(len(K), dtype=torch.bool)
        if promise is not None:
            unmet = promise.broken(K[:, asked, asked], weights).reshape(len(K)).cpu()
        changed = (weights != _alone(weights)).any(dim=1)
        fired = changed | torch.tensor(terms.mask is not None)
        inner_after = torch.einsum("bk,bkr->br", weights, K[:, added, seen])[:, 1:]
        norm_after = _length(weights, K[:, added, added])
        if fired.any() and space.rounds:
            lengths = K.diagonal(dim1=1, dim2=2)[:, seen][:, 1:] ** 0.5
            promised = fired & ~harms(inner_after, norm_after, lengths)

            def measure(tried: Tensor) -> tuple[Tensor, Tensor]:
                after = self._gram(space, terms, size=asked.stop, written=(tried, fired))
                return after[:, seen, seen], after[:, asked, asked]

            weights, after = enlarged(weights, promised, measure)
            inner_after, norm_after = after[:, 0, 1:], norm(after, 0)
            make = partial(self._write, space, terms, weights, fired)
        else:
            make = partial(self._combine, space, terms, weights, changed)
        report = reported(
            self._blocks,
            self._sets,
            K[:, seen, seen][:, : told.stop + 1, : told.stop + 1],
            inner_after=inner_after[:, told],
            norm_after=norm_after,
            coefficient=weights[:, 1:][:, told],
            fired=fired,
            unmet=unmet,
        )
        said = f"{self._rule!r}: {promise.said}" if promise is not None and unmet.any() else None
        return Change(make, lambda: report, said)

    def _gram(
        self,
        space: Space,
        terms: Terms,
        *,
        size: int,
        written: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The Gram matrices of u and the averages, in all the ways in which they are seen.

        Or of what would be `written` of u: the weights of each block, and which blocks change.
        """
        # Nearly parallel retain gradients, which a rule tells apart, leave no digit over; nor do
        # products that cancel out once each is taken in another metric.
        quick = self._count == 1 and terms.metric is None and not space.rounds
        tally = GramAccumulator(self._blocks, self._parameters, size, quick=quick)
        for i, block in enumerate(self._blocks.index):
            averages, kept, scale = terms.of(i)
            kernel = fused.weighted(space, i, averages, kept, scale, ways=terms.ways)
            if kernel is not None:
                changes = written is not None and written[1][block]
                own = written[0][block].tolist() if written is not None and changes else None
                tally.put(i, kernel.gram(size, own))
                continue
            for part, where in enumerate(space.parts(i)):
                vectors = [space.direction(i, where), *parts(averages, where)]
                if written is not None and written[1][block]:
                    x = _summed(written[0][block], vectors, *parts([kept, scale], where))
                    vectors[0] = space.rounded(i, where, x)
                asked_about, added_to = _in_metric(vectors, *parts([kept, scale], where))
                tally.add(i, part, [*vectors, *asked_about, *added_to][:size])
        return tally.by_block()

    def _write(self, space: Space, terms: Terms, weights: Tensor, changed: Tensor) -> None:
        """Make the direction what the weights say, rounded once."""
        space.begin()
        for i, block in enumerate(self._blocks.index):
            if changed[block]:
                averages, kept, scale = terms.of(i)
                kernel = fused.weighted(space, i, averages, kept, scale, ways=terms.ways)
                if kernel is not None:
                    kernel.write(weights[block].tolist(), anew=True)
                    continue
                for where in space.parts(i):
                    vectors = [space.direction(i, where), *parts(averages, where)]
                    x = _summed(weights[block], vectors, *parts([kept, scale], where))
                    space.write(i, where, x)

    def _combine(self, space: Space, terms: Terms, weights: Tensor, changed: Tensor) -> None:
        """Make the direction what the weights say, within the coordinates that may move."""
        space.begin()
        for i, block in enumerate(self._blocks.index):
            if terms.mask is None and not changed[block]:
                continue
            averages, kept, scale = terms.of(i)
            own, *others = weights[block].tolist()
            kernel = fused.weighted(space, i, averages, kept, scale, ways=terms.ways)
            # Without a mask and a metric a sum in place is one operation too.
            if kernel is not None and terms.ways > 1:
                kernel.write([own, *others], anew=False)
                continue
            for where in space.parts(i):
                if kept is not None:
                    stays = ~kept[where]
                    u = space.direction(i, where)
                    space.replace(i, where, u.masked_fill(stays, 0.0), stays.to(u.dtype))
                vectors = [None, *parts(averages, where)]
                _, added_to = _in_metric(vectors, *parts([kept, scale], where))
                pairs = zip(others, added_to[1:], strict=True)
                space.combine(i, where, own, [(w, r) for w, r in pairs if w and r is not None])

    def _weights(self, K: Tensor) -> Tensor:
        """The weights of u and the averages; (1, 0, ...) where there is no average."""
        untouched = _alone(K[:, 0])
        asked = (K.diagonal(dim1=1, dim2=2)[:, 1:] > 0).any(dim=1) | self._rule.sets_length
        if not asked.any():
            return untouched
        given = self._rule(K).to(K)
        if given.shape[-1] != untouched.shape[-1]:
            raise ValueError(
                "A rule should give as many weights as there are gradients, "
                f"{untouched.shape[-1]}. Found {given.shape[-1]} from {self._rule!r}. Give a rule "
                "of one retain gradient no more than one."
            )
        weights = torch.where(asked[:, None], given, untouched)
        if not weights.isfinite().all():
            raise ValueError(
                f"A rule should give finite weights. Found {weights.tolist()} from {self._rule!r}. "
                "Guard its divisions; nothing was changed, and a step in update space was taken "
                "back."
            )
        return weights


def _in_metric(
    vectors: Vectors, mask: Tensor | None, scale: Tensor | None
) -> tuple[Vectors, Vectors]:
    """What a rule is asked about, and what its weights go to: of u and the averages.

    Both are restricted to the mask. With a scale s, the nearest point to u that does not harm r, by
    distances of coordinates measured in sqrt(s), is u plus a multiple of r / s: the rule is asked
    about sqrt(s) u and r / sqrt(s).
    """
    kept = [v if v is None or mask is None else v * mask for v in vectors]
    if scale is None:
        return kept, kept
    u, *averages = kept
    root = scale.sqrt()
    return (
        [None if u is None else u * root, *(None if r is None else r / root for r in averages)],
        [u, *(None if r is None else r / scale for r in averages)],
    )


def _summed(weights: Tensor, vectors: Vectors, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    """The weighted sum of u and the averages, in float32 or better, as the weights go to them."""
    u, *averages = vectors
    assert u is not None
    _, (u, *averages) = _in_metric([widened(u), *averages], mask, scale)
    assert u is not None
    own, *others = weights.tolist()
    x: Tensor = u * own
    for weight, average in zip(others, averages, strict=True):
        if weight and average is not None:
            x += weight * average
    return x


def _alone(like: Tensor) -> Tensor:
    """The weights that leave u as it is."""
    weights = torch.zeros_like(like)
    weights[:, 0] = 1.0
    return weights


def _length(weights: Tensor, K: Tensor) -> Tensor:
    """|sum_k w_k g_k|; rounding may leave a hair less than zero where nothing is left."""
    return torch.einsum("bj,bjk,bk->b", weights, K, weights).clamp(min=0.0) ** 0.5
