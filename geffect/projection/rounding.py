"""Half precision: the smallest correction that rounding leaves anything of.

A constraint is kept with equality, and a correction is often smaller than what half precision can
tell apart: at a learning rate of 1e-5 the whole of it. What is written is then no longer what was
asked for, and harms after all. Rounding is monotone, though: of a larger multiple of r more
coordinates move, none of them back, so <x, r> of what is written grows with it. So the multiple is
made larger until what is written keeps the constraint. It moves the coordinates for which that
takes least, those where r is large beside the spacing of numbers. Nothing is drawn at random, and
nothing is remembered from step to step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from geffect.gram import norm

from .rules import nearest

TOLERANCE = 1e-7
"""The cosine below zero that counts as none: the averages are float32."""

DOUBLINGS = 60
HALVINGS = 5

Measure = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From weights, `Float64[block, k]`, to the Gram matrices of what would be written of them and the
averages: as they are, and as a rule is asked about them."""


def harms(inner: Tensor, length: Tensor, retain: Tensor) -> Tensor:
    """Which blocks have a direction that harms one of the averages, `Bool[block]`.

    `inner` are <x, r_j>, `length` is |x|, and `retain` are |r_j|.

    >>> harms(torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.ones(2), torch.ones(2, 2))
    tensor([False,  True])
    """
    return (inner < -TOLERANCE * length[:, None] * retain).any(dim=1)


def enlarged(weights: Tensor, promised: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """The smallest weights from these on with which what is written does no harm; its Gram matrix.

    `promised` are the blocks, `Bool[block]`, in which the weights would do none if nothing were
    rounded. What is missing is asked of `nearest`, added more and more of, and then halved back to
    within a thirtieth. A block for which nothing suffices gets weights of zero: it does not move.
    """
    K, asked = measure(weights)
    broken = promised & _harmed(K)
    if not broken.any():
        return weights, K
    low, high, searched = weights, weights, broken
    for doubling in range(DOUBLINGS):
        missing = 2.0**doubling * nearest(asked).to(weights)
        missing[:, 0] = 0.0
        low = torch.where(broken[:, None], high, low)
        high = torch.where(broken[:, None], high + missing, high)
        K, asked = measure(high)
        broken = promised & _harmed(K)
        if not broken.any():
            break
    if broken.any():
        high = high.masked_fill(broken[:, None], 0.0)
        low = torch.where(broken[:, None], high, low)
        K, _ = measure(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried, _ = measure(middle)
        bad = searched & _harmed(tried)
        low = torch.where(bad[:, None], middle, low)
        high = torch.where(bad[:, None], high, middle)
        K = torch.where(bad[:, None, None], K, tried)
    return high, K


def _harmed(K: Tensor) -> Tensor:
    lengths = torch.stack([norm(K, j) for j in range(1, K.shape[-1])], dim=1)
    return harms(K[:, 0, 1:], norm(K, 0), lengths)
