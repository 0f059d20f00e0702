"""Estimators: from the batches of a checkpoint to the Gram matrices of its gradients.

Let g_b and h_b be the gradients of two sources on batch b, independent draws with means mu_g and
mu_h. An estimator yields rows; their mean is what it estimates, and how much they vary tells how
well it is known: `geffect.analysis.intervals` draws them with replacement.

- `same_batch`: E<g_b, h_b> = <mu_g, mu_h> + tr Cov(g_b, h_b). For GA, where h = -g, that is
  -(|mu|^2 + tr(Sigma)/n) for n examples a batch with covariance Sigma, and the trace is usually the
  larger part. Public code for arXiv 2502.19301 takes both gradients on one batch.
- `split_batch`: E<g_A, h_B> = <mu_g, mu_h> for disjoint batches A and B. Squared norms are
  estimated likewise, and may come out negative where a gradient is lost in noise: its cosines are
  NaN then.
- `full`: the Gram matrix of the gradients on all of the data.
- `reference_ema`: the running averages of that public code.

`split_batch` is unbiased for the population that the data are drawn from, `full` is exact for the
data themselves. The loss of a batch is a mean over its own tokens, in all but `full`: there a token
weighs the same wherever it stands.

No batch is used in two rows of `same_batch` or `split_batch`: these would not vary on their own,
and look more certain than they are. Where a set has more batches than another, several of them
stand together, as one batch of all their data would.

With k losses that each need a backward pass, at most 2k gradients of the model are in memory, 3k
where batches stand together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from geffect import dots
from geffect.capture.collector import Measurement
from geffect.gradients import Gradients, Weights, weighted_sum

from .batch_gradients import Basis, Group, Sources, at_index, blend, gram_of
from .traits import Counts, Declared, Traits

EMA_WEIGHT = 0.4
"""The weight of a new gradient in the running average of the public code."""

READ_OUT, FIRST_READ_OUT = 4, 3
"""How many micro-batches that code takes from one printed value to the next, and to the first."""

ENOUGH_ROWS = 8
"""Rows below which how much they vary says little; `geffect.analysis.intervals` asks for them."""


def _least(counts: Counts) -> int:
    return min(counts.values())


@partial(Declared, traits=Traits(rows=_least, biased=True, matrices=True))
def same_batch(sources: Sources) -> Iterator[Measurement]:
    """Both factors on one batch: K_b is the Gram matrix of batch b. Biased by tr Cov(g_b, h_b).

    A row for each batch of the set that has the fewest.
    """
    groups = sources.cut(_least(sources.counts))
    sources.expect(sources.passes(groups))
    for group in groups:
        yield _on_one_batch(sources, group)


@partial(
    Declared,
    traits=Traits(
        rows=lambda counts: _least(counts) // 2,
        vectors=False,
        batches=2 * ENOUGH_ROWS,
        even=True,
    ),
)
def split_batch(sources: Sources) -> Iterator[Measurement]:
    """The two factors on disjoint batches A and B: K_ij = (<g_i^A, g_j^B> + <g_i^B, g_j^A>) / 2.

    Unbiased, the squared norms on the diagonal too. A row for every two batches of the set that has
    the fewest. Sketches are those of (g^A + g^B) / 2.
    """
    for name, count in sources.counts.items():
        if count < 2:
            raise ValueError(
                f"`{name}` should have two batches or more for `split_batch`, which takes the two "
                f"factors on disjoint ones. Found {count}. Pass more rows or smaller batches, or "
                "choose another estimator."
            )
    groups = sources.cut(_least(sources.counts) // 2 * 2)
    sources.expect(sources.passes(groups))
    for first, second in zip(groups[::2], groups[1::2], strict=True):
        yield _on_two_batches(sources, first, second)


def _rows_of_full(counts: Counts) -> int:
    return sum(counts.values()) if _least(counts) >= ENOUGH_ROWS else 1


@partial(Declared, traits=Traits(rows=_rows_of_full, shared=True, batches=ENOUGH_ROWS))
def full(sources: Sources) -> Iterator[Measurement]:
    """The gradients on all of the data, each a mean over its whole set: K = G G^T.

    A first pass over the data gives G = sum_b s_b g_b, with s_b the share of batch b. A second one
    gives rows whose mean is K and whose spread is its uncertainty to first order (the infinitesimal
    jackknife): with R rows in all,

        K_b = K + R (x_b - mean of x over the batches of the set),  x_b = s_b (g_b G^T + G g_b^T),

    where g_b has what depends on the set of batch b. Of one set with equal shares that is
    g_b G^T + G g_b^T - K. A row for each batch of each set; a single row, and no second pass, where
    a set has fewer than 8 batches: its spread is not known then. Sketches vary in the same way.
    The objective has to declare what its components are means over.
    """
    counts = sources.counts
    rows = _rows_of_full(counts)
    everything = Group({name: range(count) for name, count in counts.items()}, paired=False)
    sources.expect(sources.passes([everything]) * (2 if rows > 1 else 1))
    taken = sources.on(everything)
    basis: Basis = {**taken.vectors, **sources.constants}
    K = gram_of(basis)
    whole = sources.row(basis, taken.weights, taken.losses, products=K)
    if rows == 1:
        yield whole
        return
    kept = whole.gradients
    for name, count in counts.items():
        for b in range(count):
            row = _moved(sources, name, b, rows, taken, K)
            yield replace(row, gradients=kept)
            kept = None  # they are the same in all rows


def _read_outs(counts: Counts) -> range:
    """After how many micro-batches the averages are read out."""
    return range(FIRST_READ_OUT, _least(counts) + 1, READ_OUT)


@partial(
    Declared,
    traits=Traits(
        rows=lambda counts: len(_read_outs(counts)),
        used=lambda counts: dict.fromkeys(counts, max(_read_outs(counts), default=0)),
        biased=True,
        matrices=True,
    ),
)
def reference_ema(sources: Sources) -> Iterator[Measurement]:
    """The running averages of the public code: G <- 0.6 G + 0.4 g, read out every 4th micro-batch.

    The first gradient is taken whole; rows are the Gram matrices of G after micro-batches 3, 7, 11,
    ..., counted from one, in float32, of as many of each set as the smallest has. G is an average
    over data, about 4 micro-batches of them, so that it depends on their order and is biased as on
    one batch of that size.
    """
    name, least = min(sources.counts.items(), key=lambda item: item[1])
    read_outs = _read_outs(sources.counts)
    if not read_outs:
        raise ValueError(
            f"`{name}` should have {FIRST_READ_OUT} batches or more for `reference_ema`, which "
            f"reads its averages out after the first {FIRST_READ_OUT} of them and then after every "
            f"{READ_OUT}. Found {least}. Lower the size of a batch, or choose another estimator."
        )
    sources.expect(read_outs[-1])
    averages: dict[str, list[Tensor | None]] = {}
    for b in range(read_outs[-1]):
        group = Group({name: [b] for name in sources.sets}, paired=True)
        weights, losses = _average(sources, group, averages)
        if b + 1 in read_outs:
            yield sources.row({**averages, **sources.constants}, weights, losses)


# One batch or two at a time: what a function here has differentiated is let go when it returns,
# before the next is.


def _on_one_batch(sources: Sources, group: Group) -> Measurement:
    gradients = sources.on(group)
    basis = {**gradients.vectors, **sources.constants}
    return sources.row(basis, gradients.weights, gradients.losses)


def _on_two_batches(sources: Sources, a: Group, b: Group) -> Measurement:
    first, second = sources.on(a), sources.on(b)
    basis = {**first.vectors, **sources.constants}
    other = {**second.vectors, **sources.constants}
    across = _products(basis, other)

    def mean(index: int) -> dict[str, Tensor | None]:
        there = at_index(other, index)
        here = at_index(basis, index)
        return {name: weighted_sum([(t, 0.5), (there[name], 0.5)]) for name, t in here.items()}

    losses = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
    return sources.row(basis, first.weights, losses, products=(across + across.mT) / 2, at=mean)


def _moved(
    sources: Sources, name: str, b: int, rows: int, whole: Gradients, K: Tensor
) -> Measurement:
    """The row of `full` for one batch: G moved by R (s_b g_b - its mean over b), to first order."""
    count = sources.counts[name]
    part, shares = sources.part(name, b, range(count))
    basis: Basis = {**whole.vectors, **sources.constants}
    products = _products({loss: part.of(loss) for loss in shares}, basis)
    indices = [list(basis).index(loss) for loss in shares]
    change = torch.zeros_like(K)
    share = products.new_tensor([*shares.values()]).unsqueeze(-1)
    change[:, indices] = rows * (share * products - K[:, indices] / count)

    def moved(index: int) -> dict[str, Tensor | None]:
        there = at_index(basis, index)
        for loss, share in shares.items():
            terms = [(there[loss], 1 - rows / count), (part.of(loss)[index], rows * share)]
            there[loss] = weighted_sum(terms)
        return there

    return sources.row(
        basis, whole.weights, whole.losses, products=K + change + change.mT, at=moved,
        gradients=False,
    )  # fmt: skip


def _average(
    sources: Sources, group: Group, averages: dict[str, list[Tensor | None]]
) -> tuple[Weights, Mapping[str, float]]:
    """Take the next micro-batch into the averages; what the sources are of these, and losses."""
    gradients = sources.on(group)
    kept, weight = (1 - EMA_WEIGHT, EMA_WEIGHT) if averages else (0.0, 1.0)
    for name, vector in gradients.vectors.items():
        blend(averages.setdefault(name, []), vector, kept, weight)
    return gradients.weights, gradients.losses


def _products(a: Basis, b: Basis) -> Tensor:
    """The inner products `Float64[parameter, k, l]` of k gradients with l others."""
    both = dots.grams(zip(*a.values(), *b.values(), strict=True))
    return both[:, : len(a), len(a) :]
