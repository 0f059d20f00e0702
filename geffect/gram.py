"""What is read off a Gram matrix, from numpy arrays and torch tensors alike.

`K` has the shape (..., k, k); its last two axes are the k gradients of one step. Analysis and
projection both read it here, so that a conflict is the same thing in a plot and in a rule.
"""

from typing import Any

import numpy as np

ROUNDING = 1e-6
"""By how much the cosine of two vectors may come out beyond 1."""


def inner(K: Any, i: int, j: int) -> Any:
    """<g_i, g_j>."""
    return K[..., i, j]


def norm(K: Any, i: int) -> Any:
    """|g_i|; NaN where K is an estimate whose square of it is negative.

    >>> norm(np.array([[4.0, 1.0], [1.0, -0.5]]), 1)
    np.float64(nan)
    """
    with np.errstate(invalid="ignore"):
        return K[..., i, i] ** 0.5


def cosine(K: Any, i: int, j: int) -> Any:
    """<g_i, g_j> / (|g_i| |g_j|), NaN where a gradient is zero: no direction, no angle.

    Rounding may leave a quotient a hair outside of [-1, 1]; it is clipped. One that is further out
    than 1e-6 is NaN: then K is no Gram matrix of vectors but an estimate of one, and a norm is lost
    in noise.

    >>> cosine(np.array([[4.0, -2.0], [-2.0, 4.0]]), 0, 1)
    np.float64(-0.5)
    >>> cosine(np.array([[4.0, -5.0], [-5.0, 4.0]]), 0, 1)
    np.float64(nan)
    """
    with np.errstate(invalid="ignore"):
        # One norm after the other: the product of two tiny ones would underflow.
        quotient = inner(K, i, j) / norm(K, i) / norm(K, j)
        beyond = abs(quotient) > 1 + ROUNDING
        # The square root of what is negative: NaN, in numpy and torch alike.
        return quotient.clip(-1, 1) * (1.0 - 2.0 * beyond) ** 0.5


def in_conflict(K: Any, i: int, j: int) -> Any:
    """Whether a step along -g_i raises what -g_j lowers: <g_i, g_j> < 0."""
    return inner(K, i, j) < 0
