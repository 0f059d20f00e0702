"""Gradients of the model as vectors: their linear combinations, and those in `.grad`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from geffect import dots
from geffect.interrupts import to_the_end

Vector = Sequence[Tensor | None]
"""A gradient of the model: one tensor a parameter, None where the loss does not reach it."""

Weights = Mapping[str, Mapping[str, float]]
"""Sources as linear combinations of vectors, both by their names."""


def weighted_sum(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """The sum of the tensors that are there, each times its weight; None if none is."""
    total: Tensor | None = None
    is_new = False
    for tensor, weight in terms:
        if tensor is None:
            continue
        part = tensor if weight == 1.0 else tensor * weight
        if total is None:
            total, is_new = part, weight != 1.0
        else:
            # In place where it can be: a large parameter has one tensor less in memory.
            total = added(total, part, in_place=is_new)
            is_new = True
    return total


def added(total: Tensor, part: Tensor, *, in_place: bool) -> Tensor:
    """The sum, in place where the layout of `total` can hold it: sparse and dense is dense."""
    if dots.is_sparse(total) and not dots.is_sparse(part):
        return part + total
    return total.add_(part) if in_place else total + part


def combined(products: Tensor, basis: Sequence[str], weights: Weights) -> Tensor:
    """The Gram matrices of linear combinations, `Float64[..., source, source]`, from the basis's.

    Term by term, not as W K W^T: a zero weight must not meet a gradient that is not finite.
    """
    place = {name: i for i, name in enumerate(basis)}
    K = products.new_empty(*products.shape[:-2], len(weights), len(weights))
    for i, a in enumerate(weights.values()):
        for j, b in enumerate(list(weights.values())[: i + 1]):
            terms = [
                v * w * products[..., place[x], place[y]]
                for x, v in a.items()
                for y, w in b.items()
            ]
            K[..., i, j] = K[..., j, i] = torch.stack(terms).sum(dim=0)
    return K


def add_to_grads(
    leaves: Sequence[Tensor], tensor_of: Callable[[int], Tensor | None], *, copy: bool = False
) -> None:
    """Add to every `.grad` its tensor, if there is one; an interrupt waits until all are added."""
    before = [(leaf, leaf.grad, _version(leaf.grad)) for leaf in leaves]

    def add() -> None:
        for place, (leaf, grad, version) in enumerate(before):
            if leaf.grad is not grad or _version(grad) != version:
                continue  # it was added before an interrupt
            tensor = tensor_of(place)
            if tensor is not None and grad is not None:
                leaf.grad = added(grad, tensor, in_place=True)
            elif tensor is not None:
                leaf.grad = tensor.clone() if copy else tensor

    to_the_end(add)


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version
