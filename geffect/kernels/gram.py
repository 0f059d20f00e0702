"""The Gram matrix of vectors, in one pass over them."""

from collections.abc import Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import MOST, launch, rows_for
from .pieces import put_triangle, read, read_if


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
    rows = rows_for(vectors[0], k, tile=tile)
    # A kernel has eight places; those beyond k are filled, and not read.
    places = [*vectors, *[vectors[0]] * (MOST - k)]
    launch(_gram, size, *places, rows, size, K=k, tile=tile)
    return rows.sum(dim=0)


@triton.jit
def _gram(
    v0, v1, v2, v3, v4, v5, v6, v7, rows, size, K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    x0 = read(v0, at, size)
    x1 = read_if(K > 1, v1, at, size, x0)
    x2 = read_if(K > 2, v2, at, size, x0)
    x3 = read_if(K > 3, v3, at, size, x0)
    x4 = read_if(K > 4, v4, at, size, x0)
    x5 = read_if(K > 5, v5, at, size, x0)
    x6 = read_if(K > 6, v6, at, size, x0)
    x7 = read_if(K > 7, v7, at, size, x0)
    put_triangle(rows + program * K * K, x0, x1, x2, x3, x4, x5, x6, x7, K, K)
