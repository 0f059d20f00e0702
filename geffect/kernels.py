"""Kernels: passes over the gradients on a GPU, each of which reads a number once, in Triton.

Every program of a kernel looks at one tile of the coordinates, in float64, and writes what it found
into a row of its own. The rows are added up in one order: no atomics, so that results are the same
every time. `geffect.devices.has_kernels` says what they are for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

MOST = 8
"""Vectors that a kernel reads together."""

MOST_RETAIN = 3
"""Retain gradients that one reads which takes each coordinate by itself."""

TILE = 2048
"""Coordinates that a program of such a kernel looks at."""


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """The Gram matrix `Float64[k, k]` of k vectors of one length, each contiguous, on their device.

    They may be of different float types. Up to eight are read once; more of them in groups of four,
    two groups at a time.
    """
    k = len(vectors)
    if k <= MOST:
        return _gram_of_few(vectors)
    half = MOST // 2
    groups = [[*range(start, min(start + half, k))] for start in range(0, k, half)]
    matrix = vectors[0].new_empty(k, k, dtype=torch.float64)
    for a, b in combinations(groups, 2):
        indices = [*a, *b]
        at = torch.tensor(indices, device=matrix.device)
        matrix[at[:, None], at] = _gram_of_few([vectors[i] for i in indices])
    return matrix


def _gram_of_few(vectors: Sequence[Tensor]) -> Tensor:
    k, size = len(vectors), vectors[0].numel()
    tile = 4096 if k <= 2 else 2048 if k <= 4 else 1024
    rows = vectors[0].new_empty(triton.cdiv(size, tile), k, k, dtype=torch.float64)
    if size:
        # A kernel has eight places; those beyond k are filled, and not read.
        places = [*vectors, *[vectors[0]] * (MOST - k)]
        _launch(_gram, len(rows), *places, rows, size, K=k, TILE=tile)
    return rows.sum(dim=0)


KEEP, HALT, SAGO, SAGO_SUM = range(4)
"""Forms of a new direction x, by u and the retain gradients: u; 0 where u harms one of them; alpha
r where u harms it; the same, and u + alpha r elsewhere."""


@dataclass(frozen=True)
class Elementwise:
    """A direction u, and the one x that takes its place, each coordinate by itself.

    u is what lies in `now`, or what `before` has that `now` has not. x is of one of the forms, and
    0 where a mask is. All tensors are contiguous.
    """

    now: Tensor
    before: Tensor | None
    retain: Sequence[Tensor]
    mask: Tensor | None
    form: int
    alpha: float = 0.0

    def gram(self) -> Tensor:
        """The Gram matrix of u, x and the retain gradients; after it how many coordinates differ.

        `Float64[3 + retain, 3 + retain]`, with the number in the last place of the diagonal.
        """
        side = 3 + len(self.retain)
        rows = self.now.new_empty(
            triton.cdiv(self.now.numel(), TILE), side, side, dtype=torch.float64
        )
        self._launch(_elementwise_gram, rows)
        return rows.sum(dim=0)

    def write(self) -> None:
        """Write x into its place: into `now`, or so that `before` has it more than `now`."""
        self._launch(_elementwise_write, self.now)
        increment_version(self.now)

    def _launch(self, kernel: Any, out: Tensor) -> None:
        size = self.now.numel()
        if not size:
            return
        absent = self.now  # filled in, and not read
        _launch(
            kernel,
            triton.cdiv(size, TILE),
            self.now,
            absent if self.before is None else self.before,
            *self.retain,
            *[absent] * (MOST_RETAIN - len(self.retain)),
            absent if self.mask is None else self.mask.view(torch.uint8),
            out,
            size,
            self.alpha,
            R=len(self.retain),
            FORM=self.form,
            STEP=self.before is not None,
            MASKED=self.mask is not None,
            WIDE=self.now.itemsize == 8,
            TILE=TILE,
        )


@dataclass(frozen=True)
class Weighted:
    """A direction u and retain gradients, and the weighted sum x of them that takes its place.

    u is what lies in `now`, or what `before` has that `now` has not, in float32 or less. It is seen
    with the retain gradients r in up to three ways: as they are; as a rule is asked about them,
    where a mask has left something; and as its weights go to them. With a metric s the second are
    sqrt(s) u and r / sqrt(s), and the third are u and r / s. All tensors are contiguous.
    """

    now: Tensor
    before: Tensor | None
    retain: Sequence[Tensor]
    mask: Tensor | None
    metric: Tensor | None

    def gram(self, ways: int, weights: Sequence[float] | None = None) -> Tensor:
        """The Gram matrix of u and the retain gradients, seen in so many ways, one after the other.

        With the weights of u and the retain gradients, that of what would be written of them in the
        place of u.
        """
        side = ways * (1 + len(self.retain))
        rows = self.now.new_empty(
            triton.cdiv(self.now.numel(), TILE), side, side, dtype=torch.float64
        )
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
        size = self.now.numel()
        if not size:
            return
        absent = self.now  # filled in, and not read
        own, *others = weights or [1.0]
        _launch(
            kernel,
            triton.cdiv(size, TILE),
            self.now,
            absent if self.before is None else self.before,
            *self.retain,
            *[absent] * (MOST_RETAIN - len(self.retain)),
            absent if self.mask is None else self.mask.view(torch.uint8),
            absent if self.metric is None else self.metric,
            out,
            size,
            own,
            *others,
            *[0.0] * (MOST_RETAIN - len(others)),
            R=len(self.retain),
            STEP=self.before is not None,
            MASKED=self.mask is not None,
            METRIC=self.metric is not None,
            TILE=TILE,
            **constants,
        )


def take_salience(
    gradient: Tensor,
    square: Tensor | None,
    share: float,
    epsilon: float,
    places: Tensor,
    out: Tensor,
) -> None:
    """|u| / (sqrt(v / share) + epsilon) at some places, of a gradient u and the square v beside it.

    It comes into `out`, float32.
    """
    _launch_salience(gradient, square, share, epsilon, out, places=places)


def salient(
    gradient: Tensor, square: Tensor | None, share: float, epsilon: float, threshold: Tensor
) -> Tensor:
    """Where that reaches a threshold that lies on the device, `Bool` of the gradient's shape."""
    found = torch.empty_like(gradient, dtype=torch.bool)
    out = found.view(torch.uint8)
    _launch_salience(gradient, square, share, epsilon, out, threshold=threshold)
    return found


def _launch_salience(
    gradient: Tensor,
    square: Tensor | None,
    share: float,
    epsilon: float,
    out: Tensor,
    *,
    places: Tensor | None = None,
    threshold: Tensor | None = None,
) -> None:
    size = out.numel()
    if size:
        _launch(
            _salience,
            triton.cdiv(size, TILE),
            gradient,
            gradient if square is None else square,
            gradient if places is None else places,
            gradient if threshold is None else threshold,
            out,
            size,
            share,
            epsilon,
            SQUARE=square is not None,
            PLACES=places is not None,
            TILE=TILE,
        )


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[programs,](*arguments, **constants, num_warps=8)


@triton.jit
def _read(vector, at, size):
    return tl.load(vector + at, mask=at < size, other=0.0).to(tl.float64)


@triton.jit
def _put(row, i: tl.constexpr, j: tl.constexpr, x, y, K: tl.constexpr):
    product = tl.sum(x * y)
    tl.store(row + i * K + j, product)
    if i != j:
        tl.store(row + j * K + i, product)


@triton.jit
def _put_triangle(
    row, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    # The products of the first N of them, into a matrix of K rows.
    _put(row, 0, 0, x0, x0, K)
    if N > 1:
        _put(row, 0, 1, x0, x1, K)
        _put(row, 1, 1, x1, x1, K)
    if N > 2:
        _put(row, 0, 2, x0, x2, K)
        _put(row, 1, 2, x1, x2, K)
        _put(row, 2, 2, x2, x2, K)
    if N > 3:
        _put(row, 0, 3, x0, x3, K)
        _put(row, 1, 3, x1, x3, K)
        _put(row, 2, 3, x2, x3, K)
        _put(row, 3, 3, x3, x3, K)
    if N > 4:
        _put(row, 0, 4, x0, x4, K)
        _put(row, 1, 4, x1, x4, K)
        _put(row, 2, 4, x2, x4, K)
        _put(row, 3, 4, x3, x4, K)
        _put(row, 4, 4, x4, x4, K)
    if N > 5:
        _put(row, 0, 5, x0, x5, K)
        _put(row, 1, 5, x1, x5, K)
        _put(row, 2, 5, x2, x5, K)
        _put(row, 3, 5, x3, x5, K)
        _put(row, 4, 5, x4, x5, K)
        _put(row, 5, 5, x5, x5, K)
    if N > 6:
        _put(row, 0, 6, x0, x6, K)
        _put(row, 1, 6, x1, x6, K)
        _put(row, 2, 6, x2, x6, K)
        _put(row, 3, 6, x3, x6, K)
        _put(row, 4, 6, x4, x6, K)
        _put(row, 5, 6, x5, x6, K)
        _put(row, 6, 6, x6, x6, K)
    if N > 7:
        _put(row, 0, 7, x0, x7, K)
        _put(row, 1, 7, x1, x7, K)
        _put(row, 2, 7, x2, x7, K)
        _put(row, 3, 7, x3, x7, K)
        _put(row, 4, 7, x4, x7, K)
        _put(row, 5, 7, x5, x7, K)
        _put(row, 6, 7, x6, x7, K)
        _put(row, 7, 7, x7, x7, K)


@triton.jit
def _read_if(there: tl.constexpr, vector, at, size, instead):
    x = instead
    if there:
        x = _read(vector, at, size)
    return x


@triton.jit
def _gram(
    v0, v1, v2, v3, v4, v5, v6, v7, rows, size, K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    x0 = _read(v0, at, size)
    x1 = _read_if(K > 1, v1, at, size, x0)
    x2 = _read_if(K > 2, v2, at, size, x0)
    x3 = _read_if(K > 3, v3, at, size, x0)
    x4 = _read_if(K > 4, v4, at, size, x0)
    x5 = _read_if(K > 5, v5, at, size, x0)
    x6 = _read_if(K > 6, v6, at, size, x0)
    x7 = _read_if(K > 7, v7, at, size, x0)
    _put_triangle(rows + program * K * K, x0, x1, x2, x3, x4, x5, x6, x7, K, K)


@triton.jit
def _wide(vector, at, size, WIDE: tl.constexpr):
    x = tl.load(vector + at, mask=at < size, other=0.0)
    if WIDE:
        x = x.to(tl.float64)
    if not WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _against(x, u, r, alpha, FORM: tl.constexpr, WIDE: tl.constexpr):
    # By signs, not by the product: that of two tiny numbers would underflow to no conflict.
    harms = ((r > 0) & (u < 0)) | ((r < 0) & (u > 0))
    if FORM == 1:
        x = tl.where(harms, 0.0, x)
    if FORM > 1:
        instead = r * alpha
        if WIDE:
            instead = instead.to(tl.float64)
        if FORM == 3:
            x += instead
        x = tl.where(harms, instead, x)
    return x


@triton.jit
def _sides(
    now, before, r0, r1, r2, mask, at, size, alpha, R: tl.constexpr, FORM: tl.constexpr,
    STEP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    u = _wide(now, at, size, WIDE)
    if STEP:
        u = _wide(before, at, size, WIDE) - u
    x = u
    if R > 0:
        x = _against(x, u, _wide(r0, at, size, False), alpha, FORM, WIDE)
    if R > 1:
        x = _against(x, u, _wide(r1, at, size, False), alpha, FORM, WIDE)
    if R > 2:
        x = _against(x, u, _wide(r2, at, size, False), alpha, FORM, WIDE)
    if MASKED:
        x = tl.where(tl.load(mask + at, mask=at < size, other=0) != 0, x, 0.0)
    return u, x


@triton.jit
def _elementwise_gram(
    now, before, r0, r1, r2, mask, rows, size, alpha, R: tl.constexpr, FORM: tl.constexpr,
    STEP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    u, x = _sides(now, before, r0, r1, r2, mask, at, size, alpha, R, FORM, STEP, MASKED, WIDE)
    K: tl.constexpr = 3 + R
    row = rows + program * K * K
    differs = (x != u).to(tl.float64)
    u = u.to(tl.float64)
    x = x.to(tl.float64)
    y0 = _read_if(R > 0, r0, at, size, u)
    y1 = _read_if(R > 1, r1, at, size, u)
    y2 = _read_if(R > 2, r2, at, size, u)
    _put_triangle(row, u, x, y0, y1, y2, u, u, u, 2 + R, K)
    for i in tl.static_range(K - 1):
        tl.store(row + i * K + K - 1, 0.0)
        tl.store(row + (K - 1) * K + i, 0.0)
    tl.store(row + K * K - 1, tl.sum(differs))


@triton.jit
def _elementwise_write(
    now, before, r0, r1, r2, mask, out, size, alpha, R: tl.constexpr, FORM: tl.constexpr,
    STEP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    u, x = _sides(now, before, r0, r1, r2, mask, at, size, alpha, R, FORM, STEP, MASKED, WIDE)
    differs = x != u
    if STEP:
        x = _wide(before, at, size, WIDE) - x
    here = tl.load(now + at, mask=at < size, other=0.0)
    tl.store(out + at, tl.where(differs, _cast(x, here), here), mask=at < size)


@triton.jit
def _cast(x, like):
    # To bfloat16 by the bits, to nearest and even: the interpreter would cut them off.
    if like.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(like.dtype)


@triton.jit
def _direction(now, before, at, size, STEP: tl.constexpr):
    u = _wide(now, at, size, False)
    if STEP:
        u = _wide(before, at, size, False) - u
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
        x = _wide(r, at, size, False)
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
            old = _wide(before, at, size, False)
            u = old - _cast(old - x, here).to(tl.float32)
        if not STEP:
            u = _cast(x, here).to(tl.float32)
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
        _put_triangle(row, u, asked, kept, u, u, u, u, u, K, K)
    if R == 1:
        _put_triangle(row, u, x0, asked, k0, kept, a0, u, u, K, K)
    if R == 2:
        _put_triangle(row, u, x0, x1, asked, k0, k1, u, u, K, K)
    if R == 3:
        _put_triangle(row, u, x0, x1, x2, asked, k0, k1, k2, K, K)


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
        old = _wide(before, at, size, False)
        x = here.to(tl.float32)
        if ANEW:
            x = old - _summed(u, a0, a1, a2, own, w0, w1, w2, R)
        if not ANEW:
            if MASKED:
                x = tl.where(tl.load(mask + at, mask=at < size, other=0) != 0, x, old)
            x = x - _summed((own - 1) * u, a0, a1, a2, 1.0, w0, w1, w2, R)
    if not STEP:
        x = _summed(u, a0, a1, a2, own, w0, w1, w2, R)
    tl.store(out + at, _cast(x, here), mask=at < size)


@triton.jit
def _salience(
    gradient, square, places, threshold, out, size, share, epsilon, SQUARE: tl.constexpr,
    PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at
    if PLACES:
        here = tl.load(places + at, mask=at < size, other=0)
    below = tl.zeros_like(at).to(tl.float32)
    if SQUARE:
        mean = tl.load(square + here, mask=at < size, other=1.0).to(tl.float32)
        below = tl.sqrt_rn(tl.div_rn(mean, below + share))
    u = tl.load(gradient + here, mask=at < size, other=0.0).to(tl.float32)
    found = tl.div_rn(tl.abs(u), below + epsilon)
    if PLACES:
        tl.store(out + at, found, mask=at < size)
    if not PLACES:
        reached = found >= tl.load(threshold).to(tl.float32)
        tl.store(out + at, reached.to(tl.uint8), mask=at < size)
