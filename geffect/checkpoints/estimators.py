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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from geffect import dots
from geffect.batch import Batch, side_of
from geffect.capture.collector import Collector, Measurement
from geffect.gradients import (
    Gradients,
    Vector,
    Weights,
    combined,
    differentiate,
    weighted_sum,
)
from geffect.layers import trainable
from geffect.losses import Loss
from geffect.objectives import (
    Component,
    Objective,
    Reduction,
    Reference,
    SharedForward,
    step_losses,
)
from geffect.risk import nll
from geffect.sources import OBJECTIVE, UPDATE

EMA_WEIGHT = 0.4
"""The weight of a new gradient in the running average of the public code."""

READ_OUT, FIRST_READ_OUT = 4, 3
"""How many micro-batches that code takes from one printed value to the next, and to the first."""

ENOUGH_ROWS = 8
"""Rows below which how much they vary says little; `geffect.analysis.intervals` asks for them."""

Basis = Mapping[str, Vector]
"""The gradients that were taken, one a backward pass, by the names of their losses."""


NewCollector = Callable[[Weights, int, bool], Collector | None]
"""From the sources of a row, its number, and whether its gradients are to be kept whole, to what
takes them; None where nothing is kept beside the Gram matrix."""


@dataclass(frozen=True)
class Group:
    """The batches of each set that one factor of an inner product is taken on, by their places."""

    places: Mapping[str, Sequence[int]]
    paired: bool  # one of each set: losses of several sets have their value on these


class Sources:
    """The objective and the risks at one checkpoint, with their gradients on batches of named sets.

    - `objective`: one of those sets; a combination of their risks costs no backward pass.
    - `reference`: what it compares with, if it does.
    - `update`: the way of the parameters to the next checkpoint.
    - `report(done, total)` counts batches.

    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return type("Output", (), {"logits": super().forward(input_ids)})
    >>> batches = [{"input_ids": torch.tensor([[0, i]]), "labels": torch.tensor([[0, i]])}
    ...            for i in range(4)]
    >>> from geffect.objectives import GradientAscent
    >>> sets = {"forget": batches, "retain": batches}
    >>> sources = Sources(Table(4, 4), GradientAscent(), sets)
    >>> [len(list(estimator(sources))) for estimator in (same_batch, split_batch, full)]
    [4, 2, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        sets: Mapping[str, Sequence[Batch]],
        *,
        reference: Reference | None = None,
        update: Vector | None = None,
        collector: NewCollector | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sets = sets
        self.constants: Basis = {} if update is None else {UPDATE: update}
        self._parameters = list(trainable(model).values())
        self._model = model
        self._objective = objective
        self._reference = reference
        self._collector = collector
        self._report = report
        self._done = self._total = self._rows = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many batches each set has."""
        return {name: len(batches) for name, batches in self.sets.items()}

    def expect(self, total: int) -> None:
        """Say how many times batches are going to be run."""
        self._done, self._total = 0, total

    def cut(self, count: int) -> list[Group]:
        """All batches, each once, in `count` groups whose sizes differ by one at most."""
        paired = all(n == count for n in self.counts.values())
        return [
            Group(
                {name: range(n * i // count, n * (i + 1) // count)
                 for name, n in self.counts.items()},
                paired,
            )
            for i in range(count)
        ]  # fmt: skip

    def passes(self, groups: Sequence[Group]) -> int:
        """How many times batches are run for these groups."""
        return sum(1 if g.paired else sum(map(len, g.places.values())) for g in groups)

    def on(self, group: Group) -> Gradients:
        """The gradients on the batches of a group, as on one batch of all their data."""
        if group.paired:
            return self._joint({name: place for name, (place,) in group.places.items()})
        vectors: dict[str, list[Tensor | None]] = {}
        values: dict[str, float] = {}
        for name, places in group.places.items():
            for place in places:
                self._add_part(name, place, places, vectors, values)
        losses = {
            source: sum(weight * values[name] for name, weight in terms.items())
            for source, terms in self.weights.items()
        }
        return Gradients(self._parameters, [], vectors, self.weights, losses)

    def part(
        self, name: str, place: int, among: Sequence[int]
    ) -> tuple[Gradients, dict[str, float]]:
        """The gradients of all losses on one batch of a set, and their shares among some of them.

        The objective comes in its components, those that are no risks, each with the set that it
        is reduced over. With these shares, the gradients on the batches add up to those on all of
        their data.
        """
        # What is reduced over this set asks nothing of the others.
        others = {other: batches[0] for other, batches in self.sets.items()}
        batches = {**others, name: self.sets[name][place]}
        model = SharedForward(self._model)
        reductions = {name: Reduction(name, "token_mean")}
        losses: dict[str, Loss] = {name: nll(model, batches[name])}
        own = {c: how for c, how in self._reductions.items() if self._set_of(how.side) == name}
        if own:
            components = self._parts(model, batches)
            losses |= {_source(component): components[component].loss for component in own}
            reductions |= {_source(component): how for component, how in own.items()}
        shares = {loss: self._share(how, place, among) for loss, how in reductions.items()}
        return self._differentiated(losses), shares

    def row(
        self,
        basis: Basis,
        weights: Weights,
        losses: Mapping[str, float],
        *,
        products: Tensor | None = None,
        at: Callable[[int], Mapping[str, Tensor | None]] | None = None,
        gradients: bool = True,
    ) -> Measurement:
        """A row, from gradients that everything is a combination of.

        `products` are (estimates of) their inner products where these are not those of the basis
        itself. What else is kept is taken from `at(place)`, by default from the basis.
        """
        every = {**weights, **{name: {name: 1.0} for name in self.constants}}
        collector = self._collector and self._collector(every, self._rows, gradients)
        self._rows += 1
        if collector is None:
            known = _gram(basis) if products is None else products
            return Measurement(tuple(every), combined(known, list(basis), every), losses)
        for place in range(len(self._parameters)):
            collector.take(place, at(place) if at else _at(basis, place))
        measured = collector.measured(losses)
        if products is None:
            return measured
        # Of single experts nobody has estimated anything.
        return replace(measured, gram=combined(products, list(basis), every), expert_gram=None)

    @property
    def declared(self) -> dict[str, Mapping[str, float] | str]:
        """The objective where it is a combination of risks; "loss" for what is not declared."""
        objective = self.weights[OBJECTIVE]
        of_risks = objective.keys() <= self.sets.keys()
        return {OBJECTIVE: objective if of_risks else "loss", **dict.fromkeys(self.sets, "loss")}

    @property
    def weights(self) -> Weights:
        """The sources in terms of the losses of `part`."""
        objective: dict[str, float] = {}
        for component, (weight, risk) in self._components.items():
            name = risk or _source(component)
            objective[name] = objective.get(name, 0.0) + weight
        return {OBJECTIVE: objective, **{name: {name: 1.0} for name in self.sets}}

    @cached_property
    def _components(self) -> dict[str, tuple[float, str | None]]:
        """The weight of each component of the objective, and the risk that it is, if any."""
        first = {name: batches[0] for name, batches in self.sets.items()}
        with torch.no_grad():
            components = self._parts(self._model, first)
        return {name: (part.weight, part.risk) for name, part in components.items()}

    @cached_property
    def _reductions(self) -> dict[str, Reduction]:
        """Those of the components that are no risks, all of them declared."""
        declared = self._objective.reductions
        found = [name for name, (_, risk) in self._components.items() if risk is None]
        unknown = [
            name
            for name in found
            if name not in declared or self._set_of(declared[name].side) not in self.sets
        ]
        if unknown:
            raise ValueError(
                "`reductions` of the objective should say of each component over which set it is "
                "reduced, and how, so that batches can be put together. "
                f"Found nothing of {', '.join(f'`{name}`' for name in unknown)} in "
                f"{self._objective!r}. Define it, say as {{'forget': Reduction('forget', "
                "'token_mean')}; or pass as many batches of each set, an even number, and no "
                "estimator that takes all data at once."
            )
        return {name: declared[name] for name in found}

    def _share(self, how: Reduction, place: int, among: Sequence[int]) -> float:
        """What part of the tokens, or of the samples, of some batches one of them has."""
        counts = self._counts.get(how)
        if counts is None:
            name = self._set_of(how.side)
            sides = (side_of({name: batch}, how.side) for batch in self.sets[name])
            counts = [how.count(self._model, side) for side in sides]
            self._counts[how] = counts
        total = sum(counts[i] for i in among)
        return counts[place] / total if total else math.nan

    def _set_of(self, side: str) -> str:
        """The set that a side is of: itself, or the one that it is inside of."""
        return side if side in self.sets else side.partition(".")[0]

    def _parts(self, model: Any, batches: Mapping[str, Batch]) -> dict[str, Component]:
        """The components of the objective; only the risk of a whole set goes as a risk."""
        parts = self._objective.components(model, batches, self._reference)
        return {
            name: part if part.risk in self.sets else replace(part, risk=None)
            for name, part in parts.items()
        }

    @cached_property
    def _counts(self) -> dict[Reduction, list[int]]:
        return {}

    def _joint(self, places: Mapping[str, int]) -> Gradients:
        """The gradients on one batch of every set."""
        model = SharedForward(self._model)
        batches = {name: self.sets[name][place] for name, place in places.items()}
        parts = self._parts(model, batches)
        # A combination of risks is declared as that, and anything else is one tensor.
        of_risks = all(part.risk is not None for part in parts.values())
        losses = step_losses(parts, apart=of_risks)
        for name, batch in batches.items():
            if name not in losses:
                losses[name] = nll(model, batch)
        order = [OBJECTIVE, *self.sets]
        return self._differentiated({name: losses[name] for name in order})

    def _add_part(
        self,
        name: str,
        place: int,
        among: Sequence[int],
        vectors: dict[str, list[Tensor | None]],
        values: dict[str, float],
    ) -> None:
        """Add what one batch contributes to the gradients on several."""
        gradients, shares = self.part(name, place, among)
        for loss, share in shares.items():
            _blend(vectors.setdefault(loss, []), gradients.of(loss), 1.0, share)
            values[loss] = values.get(loss, 0.0) + share * gradients.losses[loss]

    def _differentiated(self, losses: Mapping[str, Loss]) -> Gradients:
        gradients = differentiate(self._parameters, losses)
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)
        return gradients


Estimator = Callable[[Sources], Iterator[Measurement]]
"""From the sources at a checkpoint to the rows of its step."""

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Traits:
    """What is known of an estimator before it runs.

    - `rows`: how many there are, from the number of batches of each set; None if that is not known.
    - `used`: how many batches of each set are.
    - `biased`: whether the mean of its rows is off, for the population and for the data.
    - `matrices`: whether each row is a Gram matrix.
    - `vectors`: whether its Gram matrices are those of gradients that could be kept.
    - `shared`: whether these are the same for all rows of a step.
    - `batches`: how many each set should have at least, where files are cut into them; `even`: an
      even number.
    """

    rows: Callable[[Counts], int] | None = None
    used: Callable[[Counts], Counts] = dict
    biased: bool = False
    matrices: bool = False
    vectors: bool = True
    shared: bool = False
    batches: int = 1
    even: bool = False


def traits_of(estimator: Estimator) -> Traits:
    """What an estimator says of itself; nothing is known of a function that says nothing."""
    if not callable(estimator):
        raise TypeError(
            "`estimator` should be a function of geffect.checkpoints.estimators, such as "
            f"split_batch. Found {estimator!r}. Import the function and pass it."
        )
    traits: Traits = getattr(estimator, "traits", Traits())
    return traits


class Declared:
    """An estimator with what is known of it; it is called like its function and has its name.

    >>> split_batch, split_batch.traits.biased
    (split_batch, False)
    """

    __name__: str

    def __init__(self, estimator: Estimator, *, traits: Traits) -> None:
        self.estimator, self.traits = estimator, traits
        update_wrapper(self, estimator)

    def __call__(self, sources: Sources) -> Iterator[Measurement]:
        return self.estimator(sources)

    def __repr__(self) -> str:
        return self.__name__


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
                f"factors on disjoint ones. Found {count}. Lower the size of a batch, or choose "
                "another estimator."
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
    K = _gram(basis)
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

    def mean(place: int) -> dict[str, Tensor | None]:
        there = _at(other, place)
        here = _at(basis, place)
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
    places = [list(basis).index(loss) for loss in shares]
    change = torch.zeros_like(K)
    share = products.new_tensor([*shares.values()]).unsqueeze(-1)
    change[:, places] = rows * (share * products - K[:, places] / count)

    def moved(place: int) -> dict[str, Tensor | None]:
        there = _at(basis, place)
        for loss, share in shares.items():
            terms = [(there[loss], 1 - rows / count), (part.of(loss)[place], rows * share)]
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
        _blend(averages.setdefault(name, []), vector, kept, weight)
    return gradients.weights, gradients.losses


def _blend(state: list[Tensor | None], vector: Vector, kept: float, weight: float) -> None:
    """state <- kept * state + weight * vector, in float32 or better; an empty state is zero."""
    state.extend([None] * (len(vector) - len(state)))
    for i, (old, new) in enumerate(zip(state, vector, strict=True)):
        if old is not None:
            old.mul_(kept)
        if new is None:
            continue
        if old is None:
            state[i] = new.to(torch.promote_types(new.dtype, torch.float32)) * weight
        else:
            old.add_(new, alpha=weight)


def _at(basis: Basis, place: int) -> dict[str, Tensor | None]:
    """The tensors of one parameter."""
    return {name: vector[place] for name, vector in basis.items()}


def _gram(basis: Basis) -> Tensor:
    return dots.grams(zip(*basis.values(), strict=True))


def _products(a: Basis, b: Basis) -> Tensor:
    """The inner products `Float64[parameter, k, l]` of k gradients with l others."""
    both = dots.grams(zip(*a.values(), *b.values(), strict=True))
    return both[:, : len(a), len(a) :]


def _source(component: str) -> str:
    return f"{OBJECTIVE}.{component}"
