"""The leaf cut: the gradient of a retain term apart from the loss of somebody else that holds it.

For a loss L(theta, R(theta)) that a Trainer makes of its retain loss R, let a leaf stand in for R.
The Trainer's own backward pass then leaves dL/dtheta at fixed R, the forget part, and in the leaf
the factor dL/dR: weight, accumulation and the scale of a GradScaler, whatever L is. A second pass
from R, started with that factor, gives the rest of the chain rule, the retain term. One forward
each, and nothing is kept of the graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geffect import distributed
from geffect.interrupts import put_back_after


class LeafCut:
    """The retain losses of one micro-batch, each with its leaf.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> cut = LeafCut()
    >>> (2 * cut.stand_in(x**2) - x).backward()
    >>> x.grad
    tensor(-1.)
    >>> term = RetainTerm([x])
    >>> term.add(cut, seed=1.0)
    >>> term.weighted, term.factor, term.loss
    ([tensor(12.)], 2.0, 18.0)
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def stand_in(self, retain: Tensor) -> Tensor:
        """What to go on with in place of a retain loss: the value of its leaf."""
        if not isinstance(retain, Tensor) or not retain.requires_grad:
            raise ValueError(
                "`compute_retain_loss` should return a tensor with a graph in a training step. "
                f"Found {retain!r}. Compute it from a forward pass with gradients, and do not "
                "detach it; or pass retain= batches, from which the retain gradient is then taken."
            )
        leaf = retain.detach().requires_grad_()
        self.pairs.append((retain, leaf))
        return leaf.clone()  # which may be changed in place, as a loss may

    def check_apart(self, loss: Tensor) -> None:
        """Refuse a loss whose rest shares operations with a retain loss.

        The Trainer's backward pass would free what the second one needs. What keeps nothing for the
        way back, as the casts of parameters that autocast remembers, may be shared.
        """
        own = _nodes(loss)
        shared = sum(_keeps_tensors(n) for retain, _ in self.pairs for n in _nodes(retain) & own)
        if shared:
            raise ValueError(
                "The retain loss should have a forward pass of its own, for its gradient to be "
                f"taken apart from that of the loss. Found {shared} operations that both are "
                "computed by. Run the model on the retain batch inside of `compute_retain_loss`; "
                "or leave the loss as it is and pass retain= batches, from which the retain "
                "gradient is then taken."
            )


class RetainTerm:
    """The gradient of the retain term, summed up beside `.grad` over the micro-batches of a step.

    `weighted` is what the loss holds of it. `unweighted` is what it gives no weight, as GradDiff
    with alpha = 0: no part of the loss, though it says what should stay. Over both, `factor` is the
    sum of the weights, and `loss` that of the losses times these.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.weighted: list[Tensor | None] = [None for _ in parameters]
        self.unweighted: list[Tensor | None] = [None for _ in parameters]
        self.factor = 0.0
        self.loss = 0.0

    def add(self, cut: LeafCut, *, seed: float) -> None:
        """Take in a micro-batch, after the Trainer's pass. `seed` stands in for a weight of 0."""
        for retain, leaf in cut.pairs:
            factor, bank = leaf.grad, self.weighted
            if factor is None or not factor.any():
                factor, bank = torch.full_like(leaf, seed / leaf.numel()), self.unweighted
            _backward_into(self.parameters, bank, retain, factor)
            self.factor += factor.sum().item()
            self.loss += (factor * leaf.detach()).sum().item()

    def put_back(self) -> None:
        """Leave the term in `.grad`, where the Trainer's own pass would have added it."""
        for parameter, tensor in zip(self.parameters, self.weighted, strict=True):
            if parameter.grad is None:
                parameter.grad = tensor
            elif tensor is not None:
                parameter.grad += tensor


def _backward_into(
    parameters: Sequence[Tensor], bank: list[Tensor | None], loss: Tensor, factor: Tensor
) -> None:
    """A backward pass that adds to the bank; `.grad` is afterwards as it was."""
    kept = [parameter.grad for parameter in parameters]

    def run() -> None:
        for parameter, tensor in zip(parameters, bank, strict=True):
            parameter.grad = tensor
        distributed.backward(parameters, loss, seed=factor)
        bank[:] = map(_added, bank, [parameter.grad for parameter in parameters])

    def put_back() -> None:
        for parameter, tensor in zip(parameters, kept, strict=True):
            parameter.grad = tensor

    put_back_after(run, put_back)


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Both, where an engine has put the gradient in place of the total, and has not added it."""
    if total is None or grad is None or grad is total:
        return total if grad is None else grad
    return total.add_(grad)


def _nodes(loss: Tensor) -> set[Any]:
    """The operations that a tensor is computed by."""
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(before for before, _ in node.next_functions)
    return seen


def _keeps_tensors(node: Any) -> bool:
    """Whether an operation keeps tensors for its way back, which a backward pass frees."""
    return any(name.startswith(("_saved_", "saved_tensors")) for name in dir(node))
