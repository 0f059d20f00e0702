"""The Hessian of a risk, as its products with vectors, and whether they are right.

A backward pass that somebody wrote may be differentiated once and no more: torch then refuses a
second derivative, or leaves it out in silence. So products are held against differences.
"""

from collections.abc import Mapping, Sequence
from math import inf, sqrt

import torch
from torch import Tensor, nn

from geffect.batch import Batch, on_device
from geffect.devices import out_of_memory
from geffect.dots import dense
from geffect.layers import trainable
from geffect.notes import line_of
from geffect.numbers import percent
from geffect.risk import RiskSet, nll, risk_gradient, scored_tokens

from .change import Change

Vector = dict[str, Tensor]

TOLERANCE, NEGLIGIBLE = 0.02, 1e-4
"""How far a product may be from a difference: of the product itself, and of that with damping."""

RADII = (1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 3e-2)
"""Halves of differences, in lengths of the parameters; tried until one agrees. Long ones are off by
third derivatives, short ones by rounding."""

WORKS = (
    "Load it uncompiled and outside of autocast, without kernels of its own, with "
    'attn_implementation="eager", or leave parameters out by `exclude`.'
)


class Hessian:
    """The Hessian of a risk over batches, plus damping, as its products with vectors.

    - `tokens`: the answer tokens of each batch that has any.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        parameters: Mapping[str, Tensor],
        damping: float,
    ) -> None:
        _check_attention(model)
        _check_precision(model)
        self.model, self.parameters, self.damping = model, parameters, damping
        counted = [(batch, int(scored_tokens(model, batch).sum())) for batch in batches]
        self.batches = [batch for batch, count in counted if count]
        self.tokens = [count for _, count in counted if count]

    def of(self, index: int, vector: Vector) -> Vector:
        """The product with the Hessian on one batch."""
        chosen = [*self.parameters.values()]
        batch = on_device(self.batches[index], chosen[0].device)
        risk = nll(self.model, batch)
        along = [vector[name].to(p.dtype) for name, p in self.parameters.items()]
        try:
            slopes = torch.autograd.grad(risk, chosen, create_graph=True, materialize_grads=True)
            bent = [(s, v) for s, v in zip(slopes, along, strict=True) if s.requires_grad]
            if not bent:  # the risk is linear in them
                return {name: self.damping * vector[name] for name in self.parameters}
            # To every leaf: torch.autograd.grad would pass by the nodes that say that a function is
            # differentiable once, since these lead to no parameter.
            torch.autograd.backward([s for s, _ in bent], [v for _, v in bent])
            second = [torch.zeros_like(p) if p.grad is None else dense(p.grad) for p in chosen]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                "The model of Newton should have second derivatives. Found none: "
                f"{line_of(error)} {WORKS}"
            ) from error
        finally:
            for parameter in self.model.parameters():
                parameter.grad = None
        return {
            name: product.double() + self.damping * vector[name]
            for name, product in zip(self.parameters, second, strict=True)
        }

    @property
    def every(self) -> range:
        """The indices of all batches."""
        return range(len(self.batches))

    @property
    def longest(self) -> list[int]:
        """The index of the batch with the most answer tokens."""
        return [max(self.every, key=self.tokens.__getitem__)]

    def product(self, vector: Vector, among: Sequence[int] | None = None) -> Vector:
        """The product with the Hessian of the mean over the answer tokens of some batches."""
        indices = self.every if among is None else among
        total = sum(self.tokens[index] for index in indices)
        sums = {name: torch.zeros_like(own) for name, own in vector.items()}
        for index in indices:
            for name, part in self.of(index, vector).items():
                sums[name] += self.tokens[index] / total * part
        return sums

    def check(self, vector: Vector, among: Sequence[int], product: Vector | None = None) -> None:
        """Refuse second derivatives that are not the slope of the gradient along a vector.

        - `among`: the indices of the batches.
        - `product`: that of the vector, where it is known.
        """
        if product is None:
            product = self.product(vector, among)
        batches = [self.batches[index] for index in among]
        own = {name: product[name] - self.damping * along for name, along in vector.items()}
        start = {name: parameter.detach().double() for name, parameter in self.parameters.items()}
        off = inf
        for radius in RADII:
            reach = radius * (norm(start) or 1.0) / norm(vector)
            slope = self._slope(vector, start, reach, batches)
            apart = norm({name: slope[name] - bent for name, bent in own.items()})
            if apart <= max(TOLERANCE * norm(slope), NEGLIGIBLE * norm(product)):
                return
            off = min(off, apart / (norm(slope) or norm(own)))
        raise ValueError(
            "Second derivatives of the model should be the slopes of its gradient. Found that they "
            f"differ by {percent(off, '.2g')}, as where a backward pass leaves them out, or the "
            f"model is not smooth. {WORKS}"
        )

    def _slope(
        self, vector: Vector, start: Vector, reach: float, batches: Sequence[Batch]
    ) -> Vector:
        """The central difference of the gradient along a vector."""
        ends = []
        for sign in (1.0, -1.0):
            moved = {name: start[name] + sign * reach * along for name, along in vector.items()}
            with Change(self.model, moved):
                ends.append(gradient_of(self.model, batches, [*vector]))
        return {name: (ends[0][name] - ends[1][name]) / (2 * reach) for name in vector}


def _check_attention(model: nn.Module) -> None:
    """Refuse kernels of attention whose second derivatives are missing, or wrong in silence."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = {getattr(config, "_attn_implementation", None) for config in configs}
    foreign = sorted(str(kernel) for kernel in found - {None, "eager", "sdpa"})
    if foreign:
        raise ValueError(
            'The attention of Newton should be "eager" or "sdpa", which have second derivatives. '
            f'Found "{foreign[0]}". Load the model with attn_implementation="eager".'
        )


def _check_precision(model: nn.Module) -> None:
    short = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.itemsize < 4}
    if short:
        raise ValueError(
            "The parameters of Newton should be of float32 or float64. Found "
            f"{min(short)}, in whose rounding second derivatives are lost. Call "
            "model.float(), or save the checkpoint in float32."
        )


def gradient_of(model: nn.Module, batches: RiskSet, names: Sequence[str]) -> Vector:
    """The gradient of the risk in float64, zero where it reaches nothing."""
    parameters = trainable(model)
    found = dict(zip(parameters, risk_gradient(model, batches).vector, strict=True))
    return {
        name: torch.zeros_like(parameters[name], dtype=torch.float64)
        if (own := found[name]) is None
        else dense(own).double()
        for name in names
    }


def dot(a: Vector, b: Vector) -> float:
    total: float = sum(torch.sum(own * b[name]).item() for name, own in a.items())
    return total


def norm(vector: Vector) -> float:
    return sqrt(dot(vector, vector))
