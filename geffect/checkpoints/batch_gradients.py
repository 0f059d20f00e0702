"""The objective and the risks at one checkpoint, with their gradients on batches of data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geffect import distributed, dots
from geffect.batch import Batch, side_of
from geffect.capture.collector import Collector, Measurement
from geffect.gradients import Gradients, Vector, Weights, combined, differentiate
from geffect.layers import trainable
from geffect.losses import Elsewhere, Loss
from geffect.objectives import (
    Component,
    Objective,
    Reduction,
    Reference,
    SharedForward,
    step_losses,
)
from geffect.relearning import Relearned
from geffect.risk import nll
from geffect.sources import FORGET, OBJECTIVE, UPDATE

from .at_copy import copy_of

Basis = Mapping[str, Vector]
"""The gradients that were taken, one a backward pass, by the names of their losses."""


NewCollector = Callable[[Weights, int, bool], Collector | None]
"""From the sources of a row, its number, and whether its gradients are to be kept whole, to what
takes them; None where nothing is kept beside the Gram matrix."""


@dataclass(frozen=True)
class Group:
    """The batches of each set that one factor of an inner product is taken on, by their indices."""

    indices: Mapping[str, Sequence[int]]
    paired: bool  # one of each set: losses of several sets have their value on these


class Sources:
    """The objective and the risks at one checkpoint, with their gradients on batches of named sets.

    - `objective`: one of those sets; a combination of their risks costs no backward pass.
    - `reference`: what it compares with, if it does.
    - `update`: the way of the parameters to the next checkpoint.
    - `relearned`: how far the forget set is relearned before the gradient of the objective is
      taken, but for its parts that are of other data.
    - `report(done, total)` counts batches.

    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return type("Output", (), {"logits": super().forward(input_ids)})
    >>> batches = [{"input_ids": torch.tensor([[0, i]]), "labels": torch.tensor([[0, i]])}
    ...            for i in range(4)]
    >>> from geffect.objectives import GradientAscent
    >>> from geffect.checkpoints.estimators import full, same_batch, split_batch
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
        relearned: Relearned | None = None,
        collector: NewCollector | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sets = sets
        self.constants: Basis = {} if update is None else {UPDATE: update}
        self._parameters = list(trainable(model).values())
        self._model = model
        self._objective = objective
        self._reference = reference
        self._relearned = relearned
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
        return sum(1 if g.paired else sum(map(len, g.indices.values())) for g in groups)

    def on(self, group: Group) -> Gradients:
        """The gradients on the batches of a group, as on one batch of all their data."""
        if group.paired:
            return self._joint({name: index for name, (index,) in group.indices.items()})
        vectors: dict[str, list[Tensor | None]] = {}
        values: dict[str, float] = {}
        for name, indices in group.indices.items():
            for index in indices:
                self._add_part(name, index, indices, vectors, values)
        losses = {
            source: sum(weight * values[name] for name, weight in terms.items())
            for source, terms in self.weights.items()
        }
        return Gradients(self._parameters, [], vectors, self.weights, losses)

    def part(
        self, name: str, index: int, among: Sequence[int]
    ) -> tuple[Gradients, dict[str, float]]:
        """The gradients of all losses on one batch of a set, and their shares among some of them.

        The objective comes in its components, those that are no risks, each with the set that it
        is reduced over. With these shares, the gradients on the batches add up to those on all of
        their data.
        """
        # What is reduced over this set asks nothing of the others.
        others = {other: batches[0] for other, batches in self.sets.items()}
        batches = {**others, name: self.sets[name][index]}
        model = SharedForward(self._model)
        reductions = {name: Reduction(name, "token_mean")}
        losses: dict[str, Loss] = {name: partial(nll, model, batches[name])}
        own = {c: how for c, how in self._reductions.items() if self._set_of(how.side) == name}
        if own:
            components = self._parts(model, batches)
            losses |= {_source(component): components[component].given for component in own}
            reductions |= {_source(component): how for component, how in own.items()}
        shares = {loss: self._share(how, index, among) for loss, how in reductions.items()}
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
        itself. What else is kept is taken from `at(index)`, by default from the basis.
        """
        every = {**weights, **{name: {name: 1.0} for name in self.constants}}
        collector = self._collector and self._collector(every, self._rows, gradients)
        self._rows += 1
        if collector is None:
            known = gram_of(basis) if products is None else products
            return Measurement(tuple(every), combined(known, list(basis), every), losses)
        for index in range(len(self._parameters)):
            collector.take(index, at(index) if at else at_index(basis, index))
        measured = collector.measured(losses, distributed.exchange)
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

    @cached_property
    def _elsewhere(self) -> Elsewhere | None:
        """Where the objective's gradient is taken, which is found once."""
        if self._relearned is None:
            return None
        keeps = self._objective.keeps
        own = [risk or _source(c) for c, (_, risk) in self._components.items() if c in keeps]
        stays = frozenset((*self._relearned.stays, *own))
        if stays >= self.weights[OBJECTIVE].keys():
            raise ValueError(
                "The objective of a replay with `relearned` should have a part that is of the "
                f"forget set. Found {self._objective!r}. Choose another, or leave `relearned` out."
            )
        return Elsewhere(copy_of(self._model, self._risk_to_forget, self._relearned), stays)

    def _is_moved(self, name: str, part: Component) -> bool:
        """Whether a component of the objective is taken at the relearned copy."""
        way, loss = self._relearned, part.risk or _source(name)
        return not (way is None or name in self._objective.keeps or loss in way.stays)

    def _risk_to_forget(self) -> Tensor:
        """The risk on the whole forget set, of whose graphs one batch is in memory at a time."""
        batches, how = self.sets[FORGET], Reduction(FORGET, "token_mean")
        everything = range(len(batches))
        terms = [
            self._share(how, index, everything)
            * checkpoint(nll, self._model, batch, use_reentrant=False)
            for index, batch in enumerate(batches)
        ]
        return torch.stack(terms).sum()

    def _share(self, how: Reduction, index: int, among: Sequence[int]) -> float:
        """What part of the tokens, or of the samples, of some batches one of them has."""
        counts = self._counts.get(how)
        if counts is None:
            name = self._set_of(how.side)
            sides = (side_of({name: batch}, how.side) for batch in self.sets[name])
            counts = [how.count(self._model, side) for side in sides]
            self._counts[how] = counts
        total = sum(counts[i] for i in among)
        return counts[index] / total if total else math.nan

    def _set_of(self, side: str) -> str:
        """The set that a side is of: itself, or the one that it is inside of."""
        return side if side in self.sets else side.partition(".")[0]

    def _parts(self, model: Any, batches: Mapping[str, Batch]) -> dict[str, Component]:
        """The components of the objective; only the risk of a whole set at theta goes as a risk."""
        parts = self._objective.components(model, batches, self._reference)
        return {
            name: replace(part, risk=None)
            if part.risk not in self.sets or self._is_moved(name, part)
            else part
            for name, part in parts.items()
        }

    @cached_property
    def _counts(self) -> dict[Reduction, list[int]]:
        return {}

    def _joint(self, indices: Mapping[str, int]) -> Gradients:
        """The gradients on one batch of every set."""
        model = SharedForward(self._model)
        batches = {name: self.sets[name][index] for name, index in indices.items()}
        parts = self._parts(model, batches)
        # A combination of risks is declared as that, and anything else at one place is one loss.
        of_risks = all(part.risk is not None for part in parts.values())
        losses: dict[str, Loss] = {
            **{name: partial(nll, model, batch) for name, batch in batches.items()},
            **step_losses(parts, apart=of_risks or self._relearned is not None),
        }
        order = [OBJECTIVE, *self.sets]
        every = dict.fromkeys((*order, *losses))
        gradients = self._differentiated({name: losses[name] for name in every})
        return replace(
            gradients,
            weights={name: gradients.weights[name] for name in order},
            losses={name: gradients.losses[name] for name in order},
        )

    def _add_part(
        self,
        name: str,
        index: int,
        among: Sequence[int],
        vectors: dict[str, list[Tensor | None]],
        values: dict[str, float],
    ) -> None:
        """Add what one batch contributes to the gradients on several."""
        gradients, shares = self.part(name, index, among)
        for loss, share in shares.items():
            blend(vectors.setdefault(loss, []), gradients.of(loss), 1.0, share)
            values[loss] = values.get(loss, 0.0) + share * gradients.losses[loss]

    def _differentiated(self, losses: Mapping[str, Loss]) -> Gradients:
        gradients = differentiate(self._parameters, losses, elsewhere=self._elsewhere)
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)
        return gradients


def blend(state: list[Tensor | None], vector: Vector, kept: float, weight: float) -> None:
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


def at_index(basis: Basis, index: int) -> dict[str, Tensor | None]:
    """The tensors of one parameter."""
    return {name: vector[index] for name, vector in basis.items()}


def gram_of(basis: Basis) -> Tensor:
    return dots.grams(zip(*basis.values(), strict=True))


def _source(component: str) -> str:
    return f"{OBJECTIVE}.{component}"
