"""Rules: from the Gram matrix of (objective, retain) to the weights of the gradient to step along.

`K` is `Float64[..., 2, 2]` over the objective gradient u and the retain gradient r, the weights are
`Float64[..., 2]`, and the new gradient is w_u u + w_r r. Leading axes are blocks, each with a
constraint of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from geffect.gram import in_conflict, inner

Rule = Callable[[Tensor], Tensor]


def gru(K: Tensor) -> Tensor:
    """GRU: the point nearest to u among those that do not harm r (arXiv 2503.09117).

    min_x |x - u|^2 such that <x, r> >= 0 has the solution x = u + max(0, -<u, r>) / |r|^2 r:
    u itself where there is no conflict, and else the part of u that is orthogonal to r.

    >>> gru(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([1.0000, 0.5000])
    """
    along_retain = torch.where(
        in_conflict(K, 0, 1), -inner(K, 0, 1) / inner(K, 1, 1), torch.zeros_like(inner(K, 0, 1))
    )
    return torch.stack([torch.ones_like(along_retain), along_retain], dim=-1)
