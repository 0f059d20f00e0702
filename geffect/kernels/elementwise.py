"""A direction that is changed by a rule for each coordinate by itself."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .direction import Direction
from .launching import rows_for
from .pieces import cast, put_triangle, read_if, wide

KEEP, HALT, SAGO, SAGO_SUM = range(4)
"""Forms of a new direction x, by u and the retain gradients: u; 0 where u harms one of them; alpha
r where u harms it; the same, and u + alpha r elsewhere."""


@dataclass(frozen=True)
class Elementwise(Direction):
    """A direction u, and the one x that takes its place: of one of the forms, 0 where a mask is."""

    form: int
    alpha: float = 0.0

    def gram(self) -> Tensor:
        """The Gram matrix of u, x and the retain gradients; after it how many coordinates differ.

        `Float64[3 + retain, 3 + retain]`, with the number in the last place of the diagonal.
        """
        rows = rows_for(self.now, 3 + len(self.retain))
        self._launch(_elementwise_gram, rows)
        return rows.sum(dim=0)

    def write(self) -> None:
        """Write x into its place: into `now`, or so that `before` has it more than `now`."""
        self._launch(_elementwise_write, self.now)
        increment_version(self.now)

    def _launch(self, kernel: Any, out: Tensor) -> None:
        is_wide = self.now.itemsize == 8
        self.launch(kernel, out, self.now.numel(), self.alpha, FORM=self.form, WIDE=is_wide)


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
    u = wide(now, at, size, WIDE)
    if STEP:
        u = wide(before, at, size, WIDE) - u
    x = u
    if R > 0:
        x = _against(x, u, wide(r0, at, size, False), alpha, FORM, WIDE)
    if R > 1:
        x = _against(x, u, wide(r1, at, size, False), alpha, FORM, WIDE)
    if R > 2:
        x = _against(x, u, wide(r2, at, size, False), alpha, FORM, WIDE)
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
    y0 = read_if(R > 0, r0, at, size, u)
    y1 = read_if(R > 1, r1, at, size, u)
    y2 = read_if(R > 2, r2, at, size, u)
    put_triangle(row, u, x, y0, y1, y2, u, u, u, 2 + R, K)
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
        x = wide(before, at, size, WIDE) - x
    here = tl.load(now + at, mask=at < size, other=0.0)
    tl.store(out + at, tl.where(differs, cast(x, here), here), mask=at < size)
