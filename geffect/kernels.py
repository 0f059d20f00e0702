"""Kernels: passes over the gradients on a GPU, each of which reads a number once, in Triton.

Every program of a kernel looks at one tile of the coordinates, in float64, and writes what it found
into a row of its own. The rows are added up in one order: no atomics, so that results are the same
every time. `geffect.devices.has_kernels` says what they are for.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 8
"""Vectors that a kernel reads together."""


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
def _gram(
    v0, v1, v2, v3, v4, v5, v6, v7, rows, size, K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    row = rows + program * K * K
    x0 = _read(v0, at, size)
    _put(row, 0, 0, x0, x0, K)
    if K > 1:
        x1 = _read(v1, at, size)
        _put(row, 0, 1, x0, x1, K)
        _put(row, 1, 1, x1, x1, K)
    if K > 2:
        x2 = _read(v2, at, size)
        _put(row, 0, 2, x0, x2, K)
        _put(row, 1, 2, x1, x2, K)
        _put(row, 2, 2, x2, x2, K)
    if K > 3:
        x3 = _read(v3, at, size)
        _put(row, 0, 3, x0, x3, K)
        _put(row, 1, 3, x1, x3, K)
        _put(row, 2, 3, x2, x3, K)
        _put(row, 3, 3, x3, x3, K)
    if K > 4:
        x4 = _read(v4, at, size)
        _put(row, 0, 4, x0, x4, K)
        _put(row, 1, 4, x1, x4, K)
        _put(row, 2, 4, x2, x4, K)
        _put(row, 3, 4, x3, x4, K)
        _put(row, 4, 4, x4, x4, K)
    if K > 5:
        x5 = _read(v5, at, size)
        _put(row, 0, 5, x0, x5, K)
        _put(row, 1, 5, x1, x5, K)
        _put(row, 2, 5, x2, x5, K)
        _put(row, 3, 5, x3, x5, K)
        _put(row, 4, 5, x4, x5, K)
        _put(row, 5, 5, x5, x5, K)
    if K > 6:
        x6 = _read(v6, at, size)
        _put(row, 0, 6, x0, x6, K)
        _put(row, 1, 6, x1, x6, K)
        _put(row, 2, 6, x2, x6, K)
        _put(row, 3, 6, x3, x6, K)
        _put(row, 4, 6, x4, x6, K)
        _put(row, 5, 6, x5, x6, K)
        _put(row, 6, 6, x6, x6, K)
    if K > 7:
        x7 = _read(v7, at, size)
        _put(row, 0, 7, x0, x7, K)
        _put(row, 1, 7, x1, x7, K)
        _put(row, 2, 7, x2, x7, K)
        _put(row, 3, 7, x3, x7, K)
        _put(row, 4, 7, x4, x7, K)
        _put(row, 5, 7, x5, x7, K)
        _put(row, 6, 7, x6, x7, K)
        _put(row, 7, 7, x7, x7, K)
