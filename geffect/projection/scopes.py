"""How wide a constraint reaches: one for each block of parameters, or one for each coordinate.

Both change a space in place and tell what they did. What is said of a step is said of the Gram
matrix of its direction u and of the averages r_1 ... r_m of the retain gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Self

import torch
from torch import Tensor

from geffect import distributed, dots
from geffect.gradients import Rectification
from geffect.gram import inner, norm

from . import fused
from .elementwise import Elementwise
from .rounding import enlarged, harms
from .rules import Rule
from .spaces import Space, Where, widened

Vectors = list[Tensor | None]

Retain = Callable[[int], Vectors]
"""The averages of a parameter's retain gradients, one a retain set."""

Mask = Callable[[int], Tensor | None]
"""The coordinates of a parameter that may move; None where all may."""

Metric = Callable[[int], Tensor | None]
"""The scale of the retain gradients' coordinates, where distances are measured in it."""


@dataclass(frozen=True)
class Blocks:
    """Which parameters share a constraint: the names of the blocks, and the one of each parameter.

    >>> Blocks.of(["head", "layer 0", "head"])
    Blocks(names=('head', 'layer 0'), index=(0, 1, 0))
    """

    names: tuple[str, ...]
    index: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Self:
        """Parameters with one label are one block."""
        names = tuple(dict.fromkeys(labels))
        return cls(names, tuple(map(names.index, labels)))


class GramAccumulator:
    """Gram matrices that are taken one parameter at a time, and added up when they are asked for.

    Adding up is one reduction where parameters are sharded, on all processes at once.
    """

    def __init__(
        self,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        size: int,
        *,
        quick: bool = True,
    ) -> None:
        self._blocks, self._parameters = blocks, parameters
        self._gram = dots.quick_gram if quick else dots.gram
        self._matrices: list[dict[int, Tensor]] = [{} for _ in parameters]
        self._nothing = torch.zeros(size, size, dtype=torch.float64)

    def knows(self, i: int, part: int) -> bool:
        """Whether a part of a parameter, by its number, is in it."""
        return part in self._matrices[i]

    def add(self, i: int, part: int, vectors: Vectors, *, count: Tensor | None = None) -> None:
        """Add the inner products of a part of a parameter, and a number that is summed up too."""
        products = self._gram(vectors)
        if count is not None:
            products = torch.block_diag(products, count.double().reshape(1, 1))
        self._matrices[i][part] = products

    def put(self, i: int, products: Tensor) -> None:
        """Add the inner products of all of a parameter, with the number."""
        self._matrices[i][0] = products

    def by_block(self) -> Tensor:
        """The Gram matrices `Float64[block, k, k]`, on the CPU."""
        over = [distributed.holders(parameter) for parameter in self._parameters]
        summed_parts = [reduce(add, m.values()) if m else self._nothing for m in self._matrices]
        table = dots.gathered(summed_parts, over)
        summed = table.new_zeros(len(self._blocks.names), *table.shape[1:])
        return summed.index_add(0, torch.tensor(self._blocks.index), table)


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


class Coordinates:
    """A rule for every coordinate by itself, one parameter after the other.

    It asks no other process anything; `report` does, on all of them at once.
    """

    def __init__(
        self,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        sets: Sequence[str],
        rule: Elementwise | None,
        *,
        count: int,
    ) -> None:
        self._blocks, self._sets, self._rule = blocks, sets, rule
        # u, x and the averages, and how many coordinates were changed.
        self._tally = GramAccumulator(blocks, parameters, 3 + count)

    def change(self, space: Space, i: int, averages: Vectors, mask: Tensor | None) -> None:
        """Change the direction of one parameter."""
        local = held(averages)
        kernel = fused.elementwise(space, i, local, mask, self._rule)
        if kernel is not None:
            if not self._tally.knows(i, 0):
                found = [0, 1, *(2 + j for j, r in enumerate(local) if r is not None)]
                count = 2 + len(local)
                products = dots.placed(kernel.gram(), [*found, count], count + 1)
                self._tally.put(i, products)
            space.change(i, kernel.write)
            return
        for part, where in enumerate(space.parts(i)):
            u, retain = space.direction(i, where), parts(local, where)
            present = [r for r in retain if r is not None]
            x = u if self._rule is None or not present else self._rule(u, present)
            if mask is not None:
                x = x * mask[where]
            changed = torch.ne(x, u, out=torch.empty_like(u))
            if not self._tally.knows(i, part):  # from before an interrupt, where u was as it was
                self._tally.add(i, part, [u, x, *retain], count=changed.sum())
            space.replace(i, where, x, changed)

    def report(self) -> Rectification:
        """What was done."""
        K = self._tally.by_block()
        u, x, averages, count = 0, 1, slice(2, 2 + len(self._sets)), -1
        seen = [u, *range(2, 2 + len(self._sets))]
        return reported(
            self._blocks,
            self._sets,
            K[:, seen][:, :, seen],
            inner_after=K[:, x, averages],
            norm_after=norm(K, x),
            coefficient=torch.full((len(K), len(self._sets)), torch.nan),
            fired=inner(K, count, count) > 0,
            unmet=torch.zeros(len(K), dtype=torch.bool),
        )


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


def held(vectors: Vectors) -> Vectors:
    """What this process holds of the tensors."""
    return [None if v is None else distributed.local(v) for v in vectors]


def parts(vectors: Vectors, where: Where) -> Vectors:
    """The same part of each tensor."""
    return [None if v is None else v[where] for v in vectors]


def reported(
    blocks: Blocks,
    sets: Sequence[str],
    before: Tensor,
    *,
    inner_after: Tensor,
    norm_after: Tensor,
    coefficient: Tensor,
    fired: Tensor,
    unmet: Tensor,
) -> Rectification:
    """The report of a step, with a number for each block and retain set."""
    count = len(sets)

    def numbers(table: Tensor) -> tuple[float, ...]:
        return tuple(table.double().expand(len(blocks.names), count).flatten().tolist())

    unknown = numbers(torch.tensor(torch.nan))
    return Rectification(
        blocks=block_names(blocks, sets),
        fired=numbers(fired[:, None]),
        coefficient=numbers(coefficient),
        inner_before=numbers(before[:, 0, 1:]),
        inner_after=numbers(inner_after),
        norm_before=numbers(norm(before, 0)[:, None]),
        norm_after=numbers(norm_after[:, None]),
        retain_norm=numbers(before.diagonal(dim1=1, dim2=2)[:, 1:] ** 0.5),
        applied_average=unknown,
        applied_fresh=unknown,
        unmet=numbers(unmet[:, None]),
    )


def skipped(blocks: tuple[str, ...]) -> Rectification:
    """The report of a step that was left alone because a gradient was zero or not finite."""
    nothing, unknown = (0.0,) * len(blocks), (float("nan"),) * len(blocks)
    return Rectification(blocks, nothing, nothing, *[unknown] * 8)


def without_retain(report: Rectification) -> Rectification:
    """The report of a step that had no retain gradient: what was changed, and nothing beside it."""
    unknown = (float("nan"),) * len(report.blocks)
    return replace(report, inner_before=unknown, inner_after=unknown, retain_norm=unknown)


def block_names(blocks: Blocks, sets: Sequence[str]) -> tuple[str, ...]:
    """What a report has a number for: the blocks, or each block and retain set.

    >>> block_names(Blocks.of(["model"]), ["retain", "world"])
    ('model, retain', 'model, world')
    """
    if len(sets) == 1:
        return blocks.names
    return tuple(f"{block}, {name}" for block in blocks.names for name in sets)


def _alone(like: Tensor) -> Tensor:
    """The weights that leave u as it is."""
    weights = torch.zeros_like(like)
    weights[:, 0] = 1.0
    return weights


def _length(weights: Tensor, K: Tensor) -> Tensor:
    """|sum_k w_k g_k|; rounding may leave a hair less than zero where nothing is left."""
    return torch.einsum("bj,bjk,bk->b", weights, K, weights).clamp(min=0.0) ** 0.5
