"""What kernels are made of: reads and writes of a tile, and products as a row of results."""

import triton
import triton.language as tl


@triton.jit
def read(vector, at, size):
    return tl.load(vector + at, mask=at < size, other=0.0).to(tl.float64)


@triton.jit
def read_if(there: tl.constexpr, vector, at, size, instead):
    x = instead
    if there:
        x = read(vector, at, size)
    return x


@triton.jit
def wide(vector, at, size, WIDE: tl.constexpr):
    x = tl.load(vector + at, mask=at < size, other=0.0)
    if WIDE:
        x = x.to(tl.float64)
    if not WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def cast(x, like):
    # To bfloat16 by the bits, to nearest and even: the interpreter would cut them off.
    if like.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(like.dtype)


@triton.jit
def put(row, i: tl.constexpr, j: tl.constexpr, x, y, K: tl.constexpr):
    product = tl.sum(x * y)
    tl.store(row + i * K + j, product)
    if i != j:
        tl.store(row + j * K + i, product)


@triton.jit
def put_triangle(
    row, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    # The products of the first N of them, into a matrix of K rows.
    put(row, 0, 0, x0, x0, K)
    if N > 1:
        put(row, 0, 1, x0, x1, K)
        put(row, 1, 1, x1, x1, K)
    if N > 2:
        put(row, 0, 2, x0, x2, K)
        put(row, 1, 2, x1, x2, K)
        put(row, 2, 2, x2, x2, K)
    if N > 3:
        put(row, 0, 3, x0, x3, K)
        put(row, 1, 3, x1, x3, K)
        put(row, 2, 3, x2, x3, K)
        put(row, 3, 3, x3, x3, K)
    if N > 4:
        put(row, 0, 4, x0, x4, K)
        put(row, 1, 4, x1, x4, K)
        put(row, 2, 4, x2, x4, K)
        put(row, 3, 4, x3, x4, K)
        put(row, 4, 4, x4, x4, K)
    if N > 5:
        put(row, 0, 5, x0, x5, K)
        put(row, 1, 5, x1, x5, K)
        put(row, 2, 5, x2, x5, K)
        put(row, 3, 5, x3, x5, K)
        put(row, 4, 5, x4, x5, K)
        put(row, 5, 5, x5, x5, K)
    if N > 6:
        put(row, 0, 6, x0, x6, K)
        put(row, 1, 6, x1, x6, K)
        put(row, 2, 6, x2, x6, K)
        put(row, 3, 6, x3, x6, K)
        put(row, 4, 6, x4, x6, K)
        put(row, 5, 6, x5, x6, K)
        put(row, 6, 6, x6, x6, K)
    if N > 7:
        put(row, 0, 7, x0, x7, K)
        put(row, 1, 7, x1, x7, K)
        put(row, 2, 7, x2, x7, K)
        put(row, 3, 7, x3, x7, K)
        put(row, 4, 7, x4, x7, K)
        put(row, 5, 7, x5, x7, K)
        put(row, 6, 7, x6, x7, K)
        put(row, 7, 7, x7, x7, K)
