"""Collapse: the largest singular directions of a gradient, taken out of an update or made small."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from geffect.numbers import is_whole

Side = Literal["input", "output", "both"]
Strength = Literal["hard", "soft", "quadratic"]
Basis = Literal["forget", "retain"]


@dataclass(frozen=True)
class Collapse:
    """RepSelect's collapse of the gradient of one weight matrix, on the top singular directions.

    With U S V^T the singular value decomposition of the gradient of the basis, cut at rank k,

        input     G <- G - G V diag(1 - 1/f) V^T
        output    G <- G - U diag(1 - 1/f) U^T G
        both      the one after the other

    where f_i is infinite for a "hard" collapse (the directions are projected out), S_i / S_k for a
    "soft" one and (S_i / S_k)^2 for a "quadratic" one. Nothing is centred, and no covariance is
    taken (filyp/RepSelect, its single-shot version).

    - `k`: how many directions; 0 for none. Those that the basis does not have, beyond its numerical
      rank, are left out.
    - `side`: which side of the matrix, `Float[output, input]`, is collapsed.
    - `source`: whose gradient is the basis: the "forget" gradient itself, or that of "retain".
    - `strength`: how much of each direction goes.

    Called with the gradient and that of the basis, both of one matrix. Raises ValueError for a k
    larger than a side of the matrix, for what is no matrix and for gradients that are not finite.

    >>> G = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> Collapse(1, "input", strength="hard")(G, G)
    tensor([[0., 0.],
            [0., 1.]])
    >>> Collapse(2, "both", strength="soft")(G, G)  # S_k^2 / S_i: the spectrum is inverted
    tensor([[0.3333, 0.0000],
            [0.0000, 1.0000]])
    """

    k: int
    side: Side = "both"
    source: Basis = "forget"
    strength: Strength = "soft"

    def __post_init__(self) -> None:
        if not is_whole(self.k, 0):
            raise ValueError(
                "`k` of Collapse should be a whole number of directions, 0 or more. Found "
                f"`k = {self.k!r}`. Pass one such as 8."
            )
        for name, valid in (("side", Side), ("source", Basis), ("strength", Strength)):
            if getattr(self, name) not in get_args(valid):
                raise ValueError(
                    f"`{name}` of Collapse should be one of {', '.join(get_args(valid))}. Found "
                    f"`{name} = {getattr(self, name)!r}`. Choose one of those."
                )

    def __call__(self, gradient: Tensor, basis: Tensor) -> Tensor:
        self._check(gradient, basis)
        if self.k == 0:
            return gradient.clone()
        U, S, Vh = torch.linalg.svd(_exact(basis), full_matrices=False)
        rank = min(self.k, int((S[0] * max(basis.shape) * torch.finfo(S.dtype).eps < S).sum()))
        if rank == 0:
            return gradient.clone()
        U, V, gone = U[:, :rank], Vh[:rank].mT, self._gone(S[:rank])
        x = _exact(gradient).to(S.dtype)
        if self.side != "output":
            x = x - (x @ V) * gone @ V.mT
        if self.side != "input":
            x = x - (U * gone) @ (U.mT @ x)
        return x.to(gradient.dtype)

    def _gone(self, S: Tensor) -> Tensor:
        """1 - 1/f, the share of each direction that goes."""
        kept = S[-1] / S
        return {
            "hard": torch.ones_like(S),
            "soft": 1 - kept,
            "quadratic": 1 - kept**2,
        }[self.strength]

    def _check(self, gradient: Tensor, basis: Tensor) -> None:
        if gradient.ndim != 2 or gradient.shape != basis.shape or self.k > min(gradient.shape):
            raise ValueError(
                "Collapse should be given the gradients of one matrix whose sides are at least "
                f"k = {self.k}. Found shapes {tuple(gradient.shape)} and {tuple(basis.shape)}. "
                "Name the matrices to collapse, or take a smaller k."
            )
        if not (gradient.isfinite().all() and basis.isfinite().all()):
            raise ValueError(
                "Collapse should be given finite gradients. Found some that are not. Look for a "
                "loss that overflows, or take gradients in float32."
            )


def _exact(tensor: Tensor) -> Tensor:
    """In float32 or better: decompositions have no half precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
