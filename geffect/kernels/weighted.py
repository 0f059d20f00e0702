"""A direction that is changed into a weighted sum of it and the retain gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .direction import MOST_RETAIN, Direction
from .launching import rows_for
from .pieces import cast, put_triangle, wide


@dataclass(frozen=True)
class Weighted(Direction):
    """A direction u, and the weighted sum x of it and the retain gradients that takes its place.

    All is in float32 or less. u is seen with the retain gradients r in up to three ways: as they
    are; as a rule is asked about them, where a mask has left something; and as its weights go to
    them. With a metric s the second are sqrt(s) u and r / sqrt(s), and the third u and r / s.
    """

    metric: Tensor | None

    def gram(self, ways: int, weights: Sequence[float] | None = None) -> Tensor:
        """The Gram matrix of u and the retain gradients, seen in so many ways, one after the other.

        With the weights of u and the retain gradients, that of what would be written of them in the
        place of u.
        """
        side = ways * (1 + len(self.retain))
        rows = rows_for(self.now, side)
        self._launch(_weighted_gram, rows, weights, WRITTEN=weights is not None, K=side)
        return rows.sum(dim=0)

    def write(self, weights: Sequence[float], out: Tensor, *, anew: bool) -> None:
        """Write what makes the direction the weighted sum, into `now` itself or into `out`.

        With `anew` it is rounded once; otherwise u is scaled where it stands and the rest is added,
        so that what does not move stays as it is to the bit.
        """
        self._launch(_weighted_write, out, weights, ANEW=anew)
        increment_version(out)

    def _launch(
        self, kernel: Any, out: Tensor, weights: Sequence[float] | None, **constants: int
    ) -> None:
        own, *others = weights or [1.0]
        self.launch(
            kernel,
            self.now if self.metric is None else self.metric,
            out,
            self.now.numel(),
            own,
            *others,
            *[0.0] * (MOST_RETAIN - len(others)),
            METRIC=self.metric is not None,
            **constants,
        )


@triton.jit
def _direction(now, before, at, size, STEP: tl.constexpr):
    u = wide(now, at, size, False)
    if STEP:
        u = wide(before, at, size, False) - u
    return u


@triton.jit
def _kept(x, mask, at, size, MASKED: tl.constexpr):
    if MASKED:
        x = tl.where(tl.load(mask + at, mask=at < size, other=0) != 0, x, 0.0)
    return x


@triton.jit
def _asked(r, root, METRIC: tl.constexpr):
    if METRIC:
        r = tl.div_rn(r, root)
    return r


@triton.jit
def _added(r, scale, METRIC: tl.constexpr):
    if METRIC:
        r = tl.div_rn(r, scale)
    return r


@triton.jit
def _retain(
    there: tl.constexpr, r, mask, scale, at, size, MASKED: tl.constexpr, METRIC: tl.constexpr
):  # fmt: skip
    # As it is, within the mask, and as a weight goes to it.
    x = scale
    kept = scale
    added = scale
    if there:
        x = wide(r, at, size, False)
        kept = _kept(x, mask, at, size, MASKED)
        added = _added(kept, scale, METRIC)
    return x, kept, added


@triton.jit
def _summed(u, a0, a1, a2, own, w0, w1, w2, R: tl.constexpr):
    x = u * own
    if R > 0:
        x += a0 * w0
    if R > 1:
        x += a1 * w1
    if R > 2:
        x += a2 * w2
    return x


@triton.jit
def _scale(metric, at, size, like, METRIC: tl.constexpr):
    scale = like
    if METRIC:
        scale = tl.load(metric + at, mask=at < size, other=1.0)
    return scale


@triton.jit
def _weighted_gram(
    now, before, r0, r1, r2, mask, metric, rows, size, own, w0, w1, w2, R: tl.constexpr,
    STEP: tl.constexpr, MASKED: tl.constexpr, METRIC: tl.constexpr, WRITTEN: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    u = _direction(now, before, at, size, STEP)
    scale = _scale(metric, at, size, u, METRIC)
    x0, k0, a0 = _retain(R > 0, r0, mask, scale, at, size, MASKED, METRIC)
    x1, k1, a1 = _retain(R > 1, r1, mask, scale, at, size, MASKED, METRIC)
    x2, k2, a2 = _retain(R > 2, r2, mask, scale, at, size, MASKED, METRIC)
    if WRITTEN:
        here = tl.load(now + at, mask=at < size, other=0.0)
        kept = _kept(u, mask, at, size, MASKED)
        x = _summed(kept, a0, a1, a2, own, w0, w1, w2, R)
        if STEP:
            old = wide(before, at, size, False)
            u = old - cast(old - x, here).to(tl.float32)
        if not STEP:
            u = cast(x, here).to(tl.float32)
    kept = _kept(u, mask, at, size, MASKED)
    asked = kept
    if METRIC:
        root = tl.sqrt_rn(scale)
        asked = kept * root
        k0 = _asked(k0, root, R > 0)
        k1 = _asked(k1, root, R > 1)
        k2 = _asked(k2, root, R > 2)
    u, x0, x1, x2 = u.to(tl.float64), x0.to(tl.float64), x1.to(tl.float64), x2.to(tl.float64)
    asked, kept = asked.to(tl.float64), kept.to(tl.float64)
    k0, k1, k2 = k0.to(tl.float64), k1.to(tl.float64), k2.to(tl.float64)
    a0 = a0.to(tl.float64)
    row = rows + program * K * K
    # With a metric and several retain gradients there are two ways at most.
    if R == 0:
        put_triangle(row, u, asked, kept, u, u, u, u, u, K, K)
    if R == 1:
        put_triangle(row, u, x0, asked, k0, kept, a0, u, u, K, K)
    if R == 2:
        put_triangle(row, u, x0, x1, asked, k0, k1, u, u, K, K)
    if R == 3:
        put_triangle(row, u, x0, x1, x2, asked, k0, k1, k2, K, K)


@triton.jit
def _weighted_write(
    now, before, r0, r1, r2, mask, metric, out, size, own, w0, w1, w2, R: tl.constexpr,
    STEP: tl.constexpr, MASKED: tl.constexpr, METRIC: tl.constexpr, ANEW: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = tl.load(now + at, mask=at < size, other=0.0)
    u = _kept(_direction(now, before, at, size, STEP), mask, at, size, MASKED)
    scale = _scale(metric, at, size, u, METRIC)
    _, _, a0 = _retain(R > 0, r0, mask, scale, at, size, MASKED, METRIC)
    _, _, a1 = _retain(R > 1, r1, mask, scale, at, size, MASKED, METRIC)
    _, _, a2 = _retain(R > 2, r2, mask, scale, at, size, MASKED, METRIC)
    if STEP:
        old = wide(before, at, size, False)
        x = here.to(tl.float32)
        if ANEW:
            x = old - _summed(u, a0, a1, a2, own, w0, w1, w2, R)
        if not ANEW:
            if MASKED:
                x = tl.where(tl.load(mask + at, mask=at < size, other=0) != 0, x, old)
            x = x - _summed((own - 1) * u, a0, a1, a2, 1.0, w0, w1, w2, R)
    if not STEP:
        x = _summed(u, a0, a1, a2, own, w0, w1, w2, R)
    tl.store(out + at, cast(x, here), mask=at < size)
