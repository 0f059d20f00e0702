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

With k losses that each need a backward pass, at most 2k gradients of the model are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from geffect import dots
from geffect.gradients import Gradients, Vector, Weights, combined, differentiate
from geffect.layers import trainable
from geffect.losses import Loss
from geffect.objectives import NPO, Objective, SharedForward, nll
from geffect.objectives.base import Batch, scored_tokens
from geffect.sources import FORGET, OBJECTIVE, UPDATE

from .collector import Measured

EMA_WEIGHT = 0.4
"""The weight of a new gradient in the running average of the public code."""

READ_OUT = 4
"""How many micro-batches that code takes from one printed value to the next."""

SEQUENCE_MEANS = (NPO,)
"""Objectives that are means over sequences; the others are means over tokens."""

Basis = Mapping[str, Vector]
"""The gradients that were taken, one a backward pass, by the names of their losses."""


class Sources:
    """The objective and the risks at one checkpoint, with their gradients on batches of named sets.

    `objective` is an `Objective` of the sets `forget` and `retain`, or weights that declare it a
    combination of the risks, which costs no backward pass. `update` is the way of the parameters to
    the next checkpoint. `report(done, total)` counts batches.

    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return type("Output", (), {"logits": super().forward(input_ids)})
    >>> batches = [{"input_ids": torch.tensor([[0, i]]), "labels": torch.tensor([[0, i]])}
    ...            for i in range(4)]
    >>> sources = Sources(Table(4, 4), {"forget": -1.0}, {"forget": batches, "retain": batches})
    >>> [len(list(estimator(sources))) for estimator in (same_batch, split_batch, full)]
    [4, 2, 8]
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Mapping[str, float],
        sets: Mapping[str, Sequence[Batch]],
        *,
        update: Vector | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.sets = sets
        self.constants: Basis = {} if update is None else {UPDATE: update}
        self._parameters = list(trainable(model).values())
        self._model = model
        self._objective = objective
        self._report = report
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        """Say how many batches are going to be run."""
        self._done, self._total = 0, total

    def joint(self, b: int) -> Gradients:
        """The gradients on the b-th batch of every set; a set that has fewer is begun again."""
        batches, model = self._batches(b), SharedForward(self._model)
        objective: Loss = (
            self._objective(model, batches)
            if isinstance(self._objective, Objective)
            else self._objective
        )
        risks = {name: nll(model, batch) for name, batch in batches.items()}
        return self._differentiated({OBJECTIVE: objective, **risks})

    def part(self, name: str, b: int) -> tuple[Gradients, dict[str, float]]:
        """The gradients of all losses on the b-th batch of one set, and their shares of the set.

        The objective comes in its components, each with the set that it is a mean over. With these
        shares, the gradients on the batches add up to those on the whole set.
        """
        batches, model = self._batches(b), SharedForward(self._model)
        losses: dict[str, Loss] = {name: nll(model, batches[name])}
        shares = {name: self._shares[name, _tokens][b]}
        if isinstance(self._objective, Objective) and name in map(self._set_of, self._components):
            for component, (loss, _) in self._objective.components(model, batches).items():
                if self._set_of(component) == name:
                    sequences = _is_sequence_mean(self._objective, component)
                    count = _sequences if sequences else _tokens
                    losses[_source(component)] = loss
                    shares[_source(component)] = self._shares[name, count][b]
        return self._differentiated(losses), shares

    def measured(
        self, products: Tensor, basis: Basis, weights: Weights, losses: Mapping[str, float]
    ) -> Measured:
        """A row, from (estimates of) the inner products of a basis."""
        every = {**weights, **{name: {name: 1.0} for name in self.constants}}
        return Measured(tuple(every), combined(products, list(basis), every), losses)

    @property
    def weights(self) -> Weights:
        """The sources in terms of the losses of `part`."""
        objective = (
            {_source(component): weight for component, weight in self._components.items()}
            if isinstance(self._objective, Objective)
            else self._objective
        )
        return {OBJECTIVE: objective, **{name: {name: 1.0} for name in self.sets}}

    @cached_property
    def _components(self) -> dict[str, float]:
        """The weights of the components of the objective."""
        if not isinstance(self._objective, Objective):
            return {}
        with torch.no_grad():
            components = self._objective.components(self._model, self._batches(0))
        return {name: weight for name, (_, weight) in components.items()}

    def _set_of(self, component: str) -> str:
        """The set that a component of the objective is a mean over."""
        return component if component in self.sets else FORGET

    @cached_property
    def _shares(self) -> dict[tuple[str, Callable[[Batch], int]], list[float]]:
        """What part of the tokens, and of the sequences, of a set each of its batches has."""
        shares: dict[tuple[str, Callable[[Batch], int]], list[float]] = {}
        for name, batches in self.sets.items():
            for count in (_tokens, _sequences):
                counts = list(map(count, batches))
                shares[name, count] = [n / sum(counts) for n in counts]
        return shares

    def _batches(self, b: int) -> dict[str, Batch]:
        return {name: batches[b % len(batches)] for name, batches in self.sets.items()}

    def _differentiated(self, losses: Mapping[str, Loss]) -> Gradients:
        gradients = differentiate(self._parameters, losses)
        self._done += 1
        self._report(self._done, self._total)
        return gradients


Estimator = Callable[[Sources], Iterator[Measured]]
"""From the sources at a checkpoint to the rows of its step."""


def same_batch(sources: Sources) -> Iterator[Measured]:
    """Both factors on one batch: K_b is the Gram matrix of batch b. Biased by tr Cov(g_b, h_b).

    A row for each batch of the forget set.
    """
    count = len(sources.sets[FORGET])
    sources.expect(count)
    for b in range(count):
        yield _on_one_batch(sources, b)


def split_batch(sources: Sources) -> Iterator[Measured]:
    """The two factors on disjoint batches A and B: K_ij = (<g_i^A, g_j^B> + <g_i^B, g_j^A>) / 2.

    Unbiased, the squared norms on the diagonal too. A row for every two batches of the forget set;
    where their number is odd, the last is left out.
    """
    for name, batches in sources.sets.items():
        if len(batches) < 2:
            raise ValueError(
                f"`{name}` should have two batches or more for `split_batch`, which takes the two "
                f"factors on disjoint ones. Found {len(batches)}. Lower the size of a batch, or "
                "choose another estimator."
            )
    count = len(sources.sets[FORGET]) // 2
    sources.expect(2 * count)
    for b in range(count):
        yield _on_two_batches(sources, 2 * b, 2 * b + 1)


def full(sources: Sources) -> Iterator[Measured]:
    """The gradients on all of the data, each a mean over its whole set: K = G G^T.

    A first pass over the data gives G = sum_b s_b g_b, with s_b the share of batch b. A second one
    gives rows whose mean is K and whose spread is its uncertainty to first order (the infinitesimal
    jackknife): with R rows in all,

        K_b = K + R (x_b - mean of x over the batches of the set),  x_b = s_b (g_b G^T + G g_b^T),

    where g_b has what depends on the set of batch b. Of one set with equal shares that is
    g_b G^T + G g_b^T - K. A row for each batch of each set; a single row, and no second pass, where
    a set has only one batch and thus no spread.
    """
    counts = {name: len(batches) for name, batches in sources.sets.items()}
    rows = sum(counts.values()) if min(counts.values()) > 1 else 1
    sources.expect(sum(counts.values()) * (2 if rows > 1 else 1))
    whole: dict[str, list[Tensor | None]] = {}
    losses: dict[str, float] = {}
    for name, count in counts.items():
        for b in range(count):
            _add_part(sources, name, b, whole, losses)
    basis: Basis = {**whole, **sources.constants}
    K, weights = _gram(basis), sources.weights
    losses = {
        source: sum(weight * losses[name] for name, weight in terms.items())
        for source, terms in weights.items()
    }
    if rows == 1:
        yield sources.measured(K, basis, weights, losses)
        return
    for name, count in counts.items():
        x = torch.stack([_along(sources, name, b, basis) for b in range(count)])
        for change in x - x.mean(dim=0):
            yield sources.measured(K + rows * change, basis, weights, losses)


def reference_ema(sources: Sources) -> Iterator[Measured]:
    """The running averages of the public code: G <- 0.6 G + 0.4 g, read out every 4th micro-batch.

    The first gradient is taken whole; rows are the Gram matrices of G after micro-batches 3, 7, 11,
    ... of the forget set, in float32. G is an average over data, about 4 micro-batches of them, so
    that it depends on their order and is biased as on one batch of that size.
    """
    count = len(sources.sets[FORGET]) // READ_OUT * READ_OUT
    if not count:
        raise ValueError(
            f"`forget` should have {READ_OUT} batches or more for `reference_ema`, which reads its "
            f"averages out after every {READ_OUT} of them. Found {len(sources.sets[FORGET])}. "
            "Lower the size of a batch, or choose another estimator."
        )
    sources.expect(count)
    averages: dict[str, list[Tensor | None]] = {}
    for b in range(count):
        weights, losses = _average(sources, b, averages)
        if b % READ_OUT == READ_OUT - 1:
            basis: Basis = {**averages, **sources.constants}
            yield sources.measured(_gram(basis), basis, weights, losses)


# One batch or two at a time: what a function here has differentiated is let go when it returns,
# before the next is.


def _on_one_batch(sources: Sources, b: int) -> Measured:
    gradients = sources.joint(b)
    basis = {**gradients.vectors, **sources.constants}
    return sources.measured(_gram(basis), basis, gradients.weights, gradients.losses)


def _on_two_batches(sources: Sources, a: int, b: int) -> Measured:
    first, second = sources.joint(a), sources.joint(b)
    basis = {**first.vectors, **sources.constants}
    across = _products(basis, {**second.vectors, **sources.constants})
    losses = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
    return sources.measured((across + across.mT) / 2, basis, first.weights, losses)


def _add_part(
    sources: Sources,
    name: str,
    b: int,
    whole: dict[str, list[Tensor | None]],
    losses: dict[str, float],
) -> None:
    """Add what a batch of a set contributes to the gradients on all of the data."""
    gradients, shares = sources.part(name, b)
    for loss, share in shares.items():
        _blend(whole.setdefault(loss, []), gradients.of(loss), 1.0, share)
        losses[loss] = losses.get(loss, 0.0) + share * gradients.losses[loss]


def _along(sources: Sources, name: str, b: int, whole: Basis) -> Tensor:
    """x_b of `full`, `Float64[parameter, k, k]`, zero for what does not depend on the set."""
    gradients, shares = sources.part(name, b)
    products = _products({loss: gradients.of(loss) for loss in shares}, whole)
    places = [list(whole).index(loss) for loss in shares]
    x = products.new_zeros(len(products), len(whole), len(whole))
    x[:, places] = products * products.new_tensor([*shares.values()]).unsqueeze(-1)
    return x + x.mT


def _average(
    sources: Sources, b: int, averages: dict[str, list[Tensor | None]]
) -> tuple[Weights, Mapping[str, float]]:
    """Take the next micro-batch into the averages; what the sources are of these, and losses."""
    gradients = sources.joint(b)
    for name, vector in gradients.vectors.items():
        kept, weight = (1 - EMA_WEIGHT, EMA_WEIGHT) if b else (0.0, 1.0)
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


def _gram(basis: Basis) -> Tensor:
    return dots.grams(zip(*basis.values(), strict=True))


def _products(a: Basis, b: Basis) -> Tensor:
    """The inner products `Float64[parameter, k, l]` of k gradients with l others."""
    both = dots.grams(zip(*a.values(), *b.values(), strict=True))
    return both[:, : len(a), len(a) :]


def _source(component: str) -> str:
    return f"{OBJECTIVE}.{component}"


def _tokens(batch: Batch) -> int:
    return int(scored_tokens(batch).sum())


def _sequences(batch: Batch) -> int:
    return len(batch["labels"])


def _is_sequence_mean(objective: Objective, component: str) -> bool:
    """Whether a component of an objective, or of those it is made of, is a mean over sequences."""
    inside = [part for part in vars(objective).values() if isinstance(part, Objective)]
    return component == FORGET and (
        isinstance(objective, SEQUENCE_MEANS)
        or any(_is_sequence_mean(part, component) for part in inside)
    )
