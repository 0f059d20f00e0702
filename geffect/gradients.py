"""The gradients of one step: one backward pass a loss, and nothing else changed.

The primitive is to put `.grad` aside, run a real `.backward()`, and take what it leaves:
`torch.autograd.grad` would bypass the hooks that data-parallel and sharded training live on.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from geffect import dots
from geffect.sources import OBJECTIVE

Vector = Sequence[Tensor | None]
"""A gradient of the model: one tensor a parameter, None where the loss does not reach it."""

Loss = Tensor | Mapping[str, float]
"""A scalar with a graph, or weights that declare a linear combination of such scalars."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of the named losses of one step.

    `vectors` holds what the backward passes left, one a pass; `weights` gives every source as a
    linear combination of them, so that a declared combination costs no pass and no memory. `others`
    are leaves beside the parameters, such as a soft prompt, whose tensors follow in the vectors.
    """

    parameters: Sequence[Tensor]
    others: Sequence[Tensor]
    vectors: Mapping[str, Vector]
    weights: Mapping[str, Mapping[str, float]]
    losses: Mapping[str, float]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the losses, in the order in which they were given."""
        return tuple(self.weights)

    def of(self, source: str) -> Vector:
        """The gradient of one source. The tensors are those of `vectors` where no sum is needed."""
        return self._summed(source)[: len(self.parameters)]

    def deposit(self, *, copy: bool = False) -> None:
        """Leave in `.grad` what a backward pass of the objective would have left there."""
        leaves = [*self.parameters, *self.others]
        for leaf, tensor in zip(leaves, self._summed(OBJECTIVE), strict=True):
            if tensor is None:
                continue
            if leaf.grad is None:
                leaf.grad = tensor.clone() if copy else tensor
            else:
                leaf.grad += tensor

    def gram(self, **further: Vector) -> Tensor:
        """The Gram matrices `Float64[parameter, source, source]`, on the CPU.

        `further` are gradients that did not come from a loss; they follow the sources.
        """
        count = len(self.parameters)
        basis = {**{name: v[:count] for name, v in self.vectors.items()}, **further}
        place = {name: i for i, name in enumerate(basis)}
        products = dots.grams(zip(*basis.values(), strict=True))
        every = [*self.weights.values(), *({name: 1.0} for name in further)]
        K = products.new_empty(len(products), len(every), len(every))
        # Term by term, not as W K W^T: a zero weight must not meet a gradient that is not finite.
        for i, a in enumerate(every):
            for j, b in enumerate(every[: i + 1]):
                terms = [
                    v * w * products[:, place[x], place[y]]
                    for x, v in a.items()
                    for y, w in b.items()
                ]
                K[:, i, j] = K[:, j, i] = torch.stack(terms).sum(dim=0)
        return K

    def _summed(self, source: str) -> list[Tensor | None]:
        terms = [(self.vectors[name], weight) for name, weight in self.weights[source].items()]
        return [
            _weighted_sum([(v[i], weight) for v, weight in terms if v[i] is not None])
            for i in range(len(terms[0][0]))
        ]


class GradientTransform(Protocol):
    """What may change a gradient on its way to the optimizer, as far as a recorder has to know."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """What the report has a number for."""

    @property
    def watched(self) -> Mapping[str, Vector]:
        """Gradients of its own that belong into the record, such as a running average."""

    @property
    def report(self) -> "Rectification | None":
        """What it did in the step that has just been taken."""

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up, for the record."""

    def observe(self, gradients: Gradients) -> None:
        """Take note of the gradients of a step, before anything is changed."""

    def rectify(self) -> None:
        """Change `.grad`, or prepare to change the optimizer's step."""


@dataclass(frozen=True)
class Rectification:
    """What a rectifier did in one step, one number a block.

    `inner` and `norm` are <u, r> and |u| of what was rectified, measured before and after,
    `retain_norm` is |r|, and `coefficient` the weight that r got: NaN where coordinates were
    stopped instead.
    """

    blocks: tuple[str, ...]
    fired: tuple[float, ...]
    coefficient: tuple[float, ...]
    inner_before: tuple[float, ...]
    inner_after: tuple[float, ...]
    norm_before: tuple[float, ...]
    norm_after: tuple[float, ...]
    retain_norm: tuple[float, ...]


def differentiate(parameters: Sequence[Tensor], losses: Mapping[str, Loss]) -> Gradients:
    """The gradients of the losses, one backward pass for each tensor and none for a combination.

    What stood in `.grad` stands there again afterwards. Losses may share a forward: the graph is
    kept for exactly as long as a later loss needs it.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> step = differentiate([x], {"forget": x**2, "objective": {"forget": -1.0}})
    >>> step.of("objective"), x.grad
    ([tensor(-6.)], None)
    """
    tensors, weights = _resolved(losses)
    values = {name: loss.item() for name, loss in tensors.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"Loss `{name}` should be finite. Found {value}. "
                "Lower the learning rate or clip; no gradient was taken and nothing was recorded."
            )
    seeds = _seeds(weights)
    # A leaf beside the parameters, such as a soft prompt, must not collect every pass either.
    leaves = [*parameters, *_other_leaves(tensors.values(), parameters)]
    kept = [leaf.grad for leaf in leaves]
    vectors: dict[str, Vector] = {}
    try:
        for (name, loss), retain_graph in zip(
            tensors.items(), _needed_later(list(tensors.values())), strict=True
        ):
            for leaf in leaves:
                leaf.grad = None
            seed = None if name not in seeds else torch.full_like(loss, seeds[name])
            loss.backward(gradient=seed, retain_graph=retain_graph)
            vectors[name] = [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in zip(leaves, kept, strict=True):
            leaf.grad = grad
    in_vectors = {
        source: {name: weight / seeds.get(name, 1.0) for name, weight in terms.items()}
        for source, terms in weights.items()
    }
    total = {
        source: sum(weight * values[name] for name, weight in terms.items())
        for source, terms in weights.items()
    }
    return Gradients(parameters, leaves[len(parameters) :], vectors, in_vectors, total)


def _resolved(
    losses: Mapping[str, Loss],
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The different tensors among the losses, and each loss in terms of them."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        if isinstance(loss, Mapping):
            continue
        _check(name, loss)
        first = next((other for other, seen in tensors.items() if seen is loss), name)
        tensors.setdefault(first, loss)
        weights[name] = {first: 1.0}
    single = dict(weights)
    for name, loss in losses.items():
        if not isinstance(loss, Mapping):
            continue
        if not (loss.keys() <= single.keys() and _are_weights(loss.values())):
            raise ValueError(
                f"Loss `{name}` should be a tensor, or weights of losses of this step that are "
                f"tensors, finite and not all zero. Found `{dict(loss)}`. Losses of this step that "
                f"are tensors: {', '.join(single) or 'none'}."
            )
        weights[name] = {}
        for part, weight in loss.items():
            (tensor,) = single[part]
            weights[name][tensor] = weights[name].get(tensor, 0.0) + float(weight)
    # The order of the sources is the order of the call, not of what kind they are.
    return tensors, {name: weights[name] for name in losses}


def _are_weights(values: Collection[object]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float)]
    return len(numbers) == len(values) and all(map(math.isfinite, numbers)) and any(numbers)


def _check(name: str, loss: object) -> None:
    should = f"Loss `{name}` should be a scalar tensor with a graph, or weights of other losses."
    if not isinstance(loss, Tensor):
        raise TypeError(f"{should} Found `{type(loss).__name__}`. Pass what the loss returned.")
    if loss.numel() != 1:
        raise ValueError(f"{should} Found shape {tuple(loss.shape)}. Take its mean or its sum.")
    if not loss.requires_grad:
        raise ValueError(
            f"{should} Found a tensor without a graph. Compute it outside of `torch.no_grad()`, "
            "from parameters that require a gradient, and do not detach it."
        )


def _seeds(weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The factor to start a pass with, where the objective is one multiple of one loss.

    The pass then computes the objective's own gradient, bit for bit, and the loss's is that over
    the factor.
    """
    terms = weights.get(OBJECTIVE, {})
    if len(terms) != 1:
        return {}
    ((name, weight),) = terms.items()
    return {} if weight == 1.0 else {name: weight}


def _needed_later(losses: Sequence[Tensor]) -> list[bool]:
    """For each loss, whether a later one shares a part of its graph that is not a leaf."""
    graphs = [{node for node in _nodes(loss) if not _is_leaf(node)} for loss in losses]
    return [
        any(not graph.isdisjoint(later) for later in graphs[i + 1 :])
        for i, graph in enumerate(graphs)
    ]


def _other_leaves(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graphs that are none of the parameters."""
    known = set(map(id, parameters))
    leaves = [node.variable for loss in losses for node in _nodes(loss) if _is_leaf(node)]
    found = {id(leaf): leaf for leaf in leaves}
    return [leaf for place, leaf in found.items() if place not in known]


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(successor for successor, _ in node.next_functions)


def _is_leaf(node: Any) -> bool:
    # AccumulateGrad, which saves nothing that a backward pass could free.
    return hasattr(node, "variable")


def _weighted_sum(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    total: Tensor | None = None
    for tensor, weight in terms:
        if tensor is None:
            continue
        part = tensor if weight == 1.0 else tensor * weight
        total = part if total is None else total + part
    return total
