"""Inner products of gradients that stay accurate on heavy-tailed vectors.

A gradient of a language model has a few coordinates that are orders of magnitude larger than the
rest. A running float32 sum loses the rest: `torch.dot` on a CPU is off by 2e-4 of |a||b|, which is
enough to flip the sign of a small inner product. Here a block of coordinates is cast to float64
while it is in the cache and multiplied there, so that neither sums nor products round, overflow
or underflow; a gradient that is contiguous is never copied whole. The Gram matrices of a record are
measured so; a rectifier, whose result is rounded to float32 anyhow, takes a quicker product on a
CPU. On a GPU one kernel does the same, and where there is none for it, blocks are larger.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from geffect import devices, distributed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.distributed import ProcessGroup

BLOCK = 65536
"""Coordinates cast at a time on a CPU: larger leaves the cache, smaller pays more calls."""


ROW = 1024
"""Coordinates whose products `quick_gram` adds up in float32."""

TABLE = 64 * ROW
"""Coordinates that it looks at at a time: what several vectors have there lies in the cache."""

SMALLEST, LARGEST = 1e-24, 1e30
"""Squared lengths between which no product overflows, and what underflows is too small to count."""


def gram(vectors: Sequence[Tensor | None]) -> Tensor:
    """The Gram matrix `Float64[k, k]` of k gradients of one parameter, on its device.

    The gradients may be of any float type, dense or sparse; None stands for zero. Of a sharded
    parameter it is the term that this process's part adds; `gathered` adds the others.

    >>> gram([torch.tensor([3.0, 4.0]), None])
    tensor([[25.,  0.],
            [ 0.,  0.]], dtype=torch.float64)
    >>> spiky = torch.ones(1_000_000); spiky[0] = 1e4
    >>> gram([spiky]).item(), torch.dot(spiky, spiky).double().item() == 100999999.0
    (100999999.0, False)
    """
    flat = _flat(vectors)
    return placed(_products([*flat.values()]), flat, len(vectors))


def quick_gram(vectors: Sequence[Tensor | None]) -> Tensor:
    """The same to 1e-6 of |a||b|, and of float32 gradients on a CPU in a third of the time.

    Products, and sums of 1024 of them, are float32; the sums of those are float64. Measured errors
    are below 2e-7. `gram` takes what float32 has no room for, and other types and devices.

    >>> spiky = torch.ones(1_000_000); spiky[0] = 1e4
    >>> abs(quick_gram([spiky]).item() / 100999999 - 1) < 1e-6
    True
    """
    flat = _flat(vectors)
    if all(v.dtype == torch.float32 and v.device.type == "cpu" for v in flat.values()):
        products = _products_in_rows(flat, len(vectors))
        # So compared, what is not a number is out of range too.
        if all(SMALLEST < products[i, i] < LARGEST or not v.any() for i, v in flat.items()):
            return torch.from_numpy(products)
    return placed(_products([*flat.values()]), flat, len(vectors))


def grams(parameters: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """The Gram matrices `Float64[parameter, k, k]` of several parameters, on the CPU.

    Gradients may be DTensors, and those that are None on one process have to be None on all.
    """
    matrices, over = [], []
    for vectors in parameters:
        matrices.append(gram(vectors))
        over.append(_layout(vectors))
    return gathered(matrices, over)


def gathered(matrices: Sequence[Tensor], over: "Sequence[tuple[ProcessGroup, ...]]") -> Tensor:
    """The matrices `Float64[parameter, k, k]` of `gram` on the CPU, of whole parameters.

    `over` are the `distributed.holders` of each parameter. Parameters may lie on different devices;
    each device is waited for once. All processes are, once, where any holds a part.
    """
    table = on_cpu(matrices)
    if not any(over):
        return table
    sums = distributed.PartialSums([table], [over])
    (whole,) = sums.filled(distributed.exchange(lambda: sums.message))
    return whole


def on_cpu(matrices: Sequence[Tensor]) -> Tensor:
    """The matrices as one table on the CPU; each device is waited for once."""
    by_device: dict[torch.device, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_device.setdefault(matrix.device, []).append(i)
    table = torch.zeros(len(matrices), *matrices[0].shape, dtype=torch.float64)
    for indices in by_device.values():
        table[indices] = torch.stack([matrices[i] for i in indices]).cpu()
    return table


def _layout(vectors: Sequence[Tensor | None]) -> "tuple[ProcessGroup, ...]":
    """The groups over which all of a parameter's gradients are split."""
    layouts = {
        (distributed.holders(vector), getattr(vector, "placements", ()))
        for vector in vectors
        if vector is not None
    }
    if len(layouts) > 1:
        raise ValueError(
            "`vectors` should be split over the processes alike. Found gradients of one parameter "
            "that are whole, or split in different ways. Redistribute them like the parameter."
        )
    return next(iter(layouts), ((), ()))[0]


def is_sparse(tensor: Tensor | None) -> bool:
    """Whether only some of the tensor's numbers are held, as of an embedding's gradient."""
    return tensor is not None and tensor.layout != torch.strided


def dense(tensor: Tensor) -> Tensor:
    """The tensor with all of its numbers, itself where it holds them.

    >>> dense(torch.sparse_coo_tensor([[1]], [2.0], (3,)))
    tensor([0., 2., 0.])
    """
    return tensor.to_dense() if is_sparse(tensor) else tensor


def _flat(vectors: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """The vectors that are there, by their indices: what this process holds of each, as a row."""
    flat = {
        i: dense(distributed.local(vector).detach()).reshape(-1)
        for i, vector in enumerate(vectors)
        if vector is not None
    }
    if len({vector.shape for vector in flat.values()}) > 1:
        raise ValueError(
            f"`vectors` should have one shape. Found {[tuple(v.shape) for v in flat.values()]}. "
            "Pass gradients of the same parameter."
        )
    return flat


def placed(products: Tensor, indices: Iterable[int], count: int) -> Tensor:
    """The inner products of the vectors at some indices among all, where the others are zero."""
    if len(products) == count:
        return products
    matrix = products.new_zeros(count, count)
    index = devices.sent(torch.tensor([*indices], dtype=torch.long), products.device)
    matrix[index.unsqueeze(1), index] = products
    return matrix


def _products(flat: Sequence[Tensor]) -> Tensor:
    if not flat:
        return torch.zeros(0, 0, dtype=torch.float64)
    if devices.has_kernels(*flat):
        from geffect import kernels  # Triton is not everywhere

        return kernels.gram([vector.contiguous() for vector in flat])
    size, device = flat[0].numel(), flat[0].device
    length = devices.at_a_time(flat[0], cached=BLOCK)
    rows = torch.empty(len(flat), min(size, length), dtype=torch.float64, device=device)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=device)
    for start in range(0, size, length):
        block = rows[:, : min(length, size - start)]
        for row, vector in zip(block, flat, strict=True):
            row.copy_(vector[start : start + length])
        products.addmm_(block, block.T)
    return products


@np.errstate(over="ignore", invalid="ignore")  # such a result is not used
def _products_in_rows(flat: Mapping[int, Tensor], count: int) -> "NDArray[np.float64]":
    values = {i: vector.numpy() for i, vector in flat.items()}
    size = len(next(iter(values.values()), ()))
    # A vector comes from memory faster beside another one, and is in the cache for its square then.
    pairs = [*combinations(values, 2), *zip(values, values, strict=True)]
    sums = np.empty((len(pairs), -(-size // ROW)), dtype=np.float32)
    # What is left over after the last whole row is a shorter one.
    whole = size - size % ROW
    ends = [*range(0, whole, TABLE), whole, *([size] if whole < size else [])]
    for start, end in pairwise(ends):
        tables = {i: v[start:end].reshape(-1, min(ROW, end - start)) for i, v in values.items()}
        of_rows = sums[:, start // ROW : start // ROW + TABLE // ROW]
        for (i, j), out in zip(pairs, of_rows, strict=True):
            np.vecdot(tables[i], tables[j], out=out[: len(tables[i])])
    products = np.zeros((count, count))
    for (i, j), total in zip(pairs, sums.sum(axis=1, dtype=np.float64), strict=True):
        products[i, j] = products[j, i] = total
    return products
