"""Rules: from the Gram matrix of (objective, retain, ...) to the weights of the new gradient.

`K` is `Float64[..., k, k]` over the objective gradient u and the retain gradients r_1, r_2, ...,
the weights are `Float64[..., k]`, and the new gradient is w_u u + w_1 r_1 + w_2 r_2 + ... Leading
axes are blocks, each with a constraint of its own. A retain gradient that is zero takes no part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from itertools import combinations

import torch
from torch import Tensor

from geffect.gram import in_conflict, inner, norm

Weights = Callable[[Tensor], Tensor]
"""The weights of the new gradient, as a function of the Gram matrix."""


@dataclass(frozen=True)
class Promise:
    """What a rule says that the new gradient is, where there may be none that is.

    - `broken`: from the Gram matrix and the weights to `Bool[...]`: where it is not.
    - `said`: what it then is instead, for the warning of a rectifier.
    """

    broken: Callable[[Tensor, Tensor], Tensor]
    said: str


class Rule:
    """A rule: weights as a function of the Gram matrix, and what a rectifier has to know of it.

    - `weights`: `Float64[..., k, k]` -> `Float64[..., k]`; the rule is called like it and has its
      name.
    - `adds_retain`: whether it adds the retain gradient as it is, so that the step trains on the
      retain data too. Such a rule makes something else of a retain gradient that is twice as long:
      a step of an optimizer has no length in common with it, so update space refuses the rule.
    - `one_retain`: whether it takes one retain gradient and no more.
    - `sets_length`: whether it says how long the new gradient is, so that it is also asked about a
      block without a retain gradient.
    - `promise`: what may not be possible. A rectifier warns of it once, and marks each such step in
      its report and in the run file: `unmet`.

    A function given as it is to a `Rectifier` counts as one that declares nothing. Nothing tries it
    out: declare what holds.

    >>> @partial(Rule, adds_retain=True)
    ... def total(K):
    ...     return torch.ones_like(K[..., 0])
    >>> total, total.adds_retain, total(torch.eye(2))
    (total, True, tensor([1., 1.]))
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        weights: Weights,
        *,
        adds_retain: bool = False,
        one_retain: bool = False,
        sets_length: bool = False,
        promise: Promise | None = None,
    ) -> None:
        self.weights, self.adds_retain, self.one_retain = weights, adds_retain, one_retain
        self.sets_length, self.promise = sets_length, promise
        update_wrapper(self, weights)

    def __call__(self, K: Tensor) -> Tensor:
        if self.one_retain:
            check_one_retain(repr(self), K.shape[-1] - 1)
        return self.weights(K)

    def __repr__(self) -> str:
        return getattr(self, "__name__", None) or type(self.weights).__name__

    def __reduce__(self) -> str:
        return self.__qualname__


MOST_CONSTRAINTS = 16
"""Of a rule whose work doubles with each."""

PARALLEL = 1e-6
"""Retain gradients at a smaller angle count as one.

To tell them apart takes weights so large that float32 gradients lose in their sum what is gained.
"""


@partial(Rule, one_retain=True)
def gru(K: Tensor) -> Tensor:
    """GRU: the point nearest to u among those that do not harm r (arXiv 2503.09117).

    min_x |x - u|^2 such that <x, r> >= 0 has the solution x = u + max(0, -<u, r>) / |r|^2 r:
    u itself where there is no conflict, and else the part of u that is orthogonal to r. For several
    retain gradients there is `nearest`.

    >>> gru(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([1.0000, 0.5000])
    """
    along_retain = torch.where(in_conflict(K, 0, 1), -_along(K, 0, 1), 0.0)
    return torch.stack([torch.ones_like(along_retain), along_retain], dim=-1)


@partial(Rule, one_retain=True)
def a_gem(K: Tensor) -> Tensor:
    """A-GEM: what GRU does, where r is of samples drawn from a memory (arXiv 1812.00420).

    The weights are those of `gru`. The difference is r: A-GEM draws a batch from its memory at each
    step and keeps no average, so take `Rectifier(model, a_gem, ema=1.0)`.

    >>> a_gem(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([1.0000, 0.5000])
    """
    return gru(K)


@partial(Rule, one_retain=True)
def orthogonal(K: Tensor) -> Tensor:
    """The part of u that is orthogonal to r, in conflict or not: x = u - <u, r> / |r|^2 r.

    To first order the step leaves the retain risk where it is, also where it would have lowered it.

    >>> orthogonal(torch.tensor([[4.0, 1.0], [1.0, 2.0]]))
    tensor([ 1.0000, -0.5000])
    """
    along_retain = -_along(K, 0, 1)
    return torch.stack([torch.ones_like(along_retain), along_retain], dim=-1)


@partial(Rule, adds_retain=True, one_retain=True)
def pcgrad(K: Tensor) -> Tensor:
    """PCGrad of two tasks: the sum of u and r, each without what conflicts (arXiv 2001.06782).

    x = (u - <u, r> / |r|^2 r) + (r - <u, r> / |u|^2 u) in conflict, else u + r. The step trains on
    the retain data too: an objective that holds a retain term of its own gets it twice.

    >>> pcgrad(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([1.2500, 1.5000])
    """
    lost = torch.stack([_along(K, 1, 0), _along(K, 0, 1)], dim=-1)
    return 1 - torch.where(in_conflict(K, 0, 1)[..., None], lost, 0.0)


@partial(Rule, adds_retain=True, one_retain=True)
def blur(K: Tensor) -> Tensor:
    """BLUR: forgetting comes first, and r is added without its part along u (arXiv 2506.08164).

    x = u + (r - <r, u> / |u|^2 u), so that <x, u> = |u|^2: the step forgets as fast as along u. It
    may harm r. It trains on the retain data too: an objective that holds a retain term of its own
    gets it twice.

    >>> blur(torch.tensor([[4.0, -1.0], [-1.0, 2.0]]))
    tensor([1.2500, 1.0000])
    """
    along_objective = 1 - _along(K, 1, 0)
    return torch.stack([along_objective, torch.ones_like(along_objective)], dim=-1)


@Rule
def off_span(K: Tensor) -> Tensor:
    """OGPSA: the part of u that is orthogonal to every retain gradient (arXiv 2602.07892).

    w = (1, -K_rr^+ K_ru), with the pseudo-inverse of the Gram matrix of the retain gradients at
    length one, so that a short one counts like a long one. One that lies in the span of the others,
    to within an angle of 1e-6, adds nothing to it. With one retain gradient this is `orthogonal`.

    >>> off_span(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [2.0, 0.0, 4.0]]).double())
    tensor([ 1.0000, -1.0000, -0.5000], dtype=torch.float64)
    """
    R, c, lengths = _unit(K)
    inverse = torch.linalg.pinv(R, atol=PARALLEL**2, rtol=0.0, hermitian=True)
    return _weights(-(inverse @ c[..., None])[..., 0], lengths)


def _not_nearest(K: Tensor, weights: Tensor) -> Tensor:
    """Whether the weights miss the conditions of the optimum by more than what counts as one."""
    R, c, lengths = _unit(K)
    w = weights[..., 1:] * lengths[..., 1:] / lengths[..., :1]
    inner_after = (R @ w[..., None])[..., 0] + c
    slack = torch.where(w > 0, inner_after.abs(), -inner_after)
    broken: Tensor = (slack > 4 * PARALLEL * lengths[..., :1]).any(dim=-1) | (w < 0).any(dim=-1)
    return broken


@partial(
    Rule,
    promise=Promise(
        _not_nearest,
        "rounding leaves no step that meets the conditions of the nearest, as the retain gradients "
        "are nearly dependent, and the one that misses them least is taken",
    ),
)
def nearest(K: Tensor) -> Tensor:
    """The point nearest to u among those that harm none of the retain gradients.

    min_x |x - u|^2 such that <x, r_j> >= 0 for every j. The solution is x = u + sum_j w_j r_j where
    w_j >= 0, <x, r_j> >= 0, and one of the two is zero for each j. With one retain gradient this is
    `gru`. Exact: every choice of the w_j that may differ from zero is solved, and the one is taken
    that meets these conditions to rounding. So the work doubles with each retain gradient, of which
    16 are the most. Those that differ from the opposite of another by an angle below 1e-6 count as
    its opposite.

    With the gradients of the last steps as constraints and the metric of Adam this is GU:
    `Rectifier(model, nearest, history=8, space="update", correction="adam", optimizer=optimizer)`.

    Raises ValueError for more than 16.

    >>> K = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]).double()
    >>> nearest(K)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    R, c, lengths = _unit(K)
    count = c.shape[-1]
    if count > MOST_CONSTRAINTS:
        raise ValueError(
            f"`nearest` should be given {MOST_CONSTRAINTS} retain gradients at most: its work "
            f"doubles with each. Found {count}. Add losses up, or take `off_span`."
        )
    solution = torch.zeros_like(c)
    error = (-c).clamp(min=0).amax(dim=-1)  # of w = 0: the worst conflict
    for size in range(1, count + 1):
        w, missed = _best_of_size(R, c, size)
        better = missed < error
        solution = torch.where(better[..., None], w, solution)
        error = torch.where(better, missed, error)
    return _weights(solution.clamp(min=0), lengths)


def _best_of_size(R: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of all choices of so many w_j that may differ from zero the best; by how much it misses."""
    free = torch.tensor([*combinations(range(c.shape[-1]), size)], device=c.device)
    rows, columns = free[:, :, None], free[:, None, :]
    # Not `solve`, which refuses singular matrices: what comes of one shows in its error.
    w_free, _ = torch.linalg.solve_ex(R[..., rows, columns], -c[..., free])
    places = free.expand(w_free.shape)
    w = c.new_zeros(*w_free.shape[:-1], c.shape[-1]).scatter_(-1, places, w_free)
    inner_after = w @ R + c[..., None, :]
    residual = inner_after.gather(-1, places).abs()
    missed = torch.cat([-w, -inner_after, residual], dim=-1).amax(dim=-1)
    # Of two choices that rounding cannot tell apart, that of the smaller weights.
    missed = missed + PARALLEL**2 * w.abs().sum(dim=-1)
    missed = torch.where(missed.isnan(), torch.inf, missed)
    best = missed.argmin(dim=-1, keepdim=True)
    chosen = best[..., None].expand(*best.shape, c.shape[-1])
    return w.gather(-2, chosen).squeeze(-2), missed.gather(-1, best).squeeze(-1)


def _along(K: Tensor, i: int, j: int) -> Tensor:
    """<g_i, g_j> / |g_j|^2; 0 where g_j is zero."""
    return torch.where(inner(K, j, j) > 0, inner(K, i, j) / inner(K, j, j), 0.0)


def _unit(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix of the retain gradients and their products with u, at length one; lengths.

    A gradient that is zero stays so, and its length is 1.
    """
    lengths = torch.stack([norm(K, i) for i in range(K.shape[-1])], dim=-1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    # One length after the other: the product of two tiny ones would underflow.
    cosines = K / lengths[..., None] / lengths[..., None, :]
    return cosines[..., 1:, 1:], cosines[..., 0, 1:], lengths


def _weights(retain: Tensor, lengths: Tensor) -> Tensor:
    """(1, w_1, ...) for the gradients as they are, from the w_j for those of length one."""
    own = torch.ones_like(lengths[..., :1])
    return torch.cat([own, retain * lengths[..., :1] / lengths[..., 1:]], dim=-1)


def check_one_retain(rule: str, count: int) -> None:
    """Refuse several retain gradients for a rule that takes one."""
    if count != 1:
        raise ValueError(
            f"`{rule}` should be given one retain gradient beside the objective's. Found {count}. "
            "Add their losses up, or take `nearest` or `off_span`, which are for several."
        )
