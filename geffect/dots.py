"""Inner products of gradients that stay accurate on heavy-tailed vectors.

A gradient of a language model has a few coordinates that are orders of magnitude larger than the
rest. A running float32 sum loses the rest: `torch.dot` on a CPU is off by 2e-4 of |a||b|, which is
enough to flip the sign of a small inner product. Here a block of coordinates is cast to float64
while it is in the cache and multiplied there, so that neither sums nor products round, overflow
or underflow; the gradients themselves are never copied whole.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geffect import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BLOCK = 65536
"""Coordinates cast at a time: larger leaves the cache, smaller pays more calls."""


def gram(vectors: Sequence[Tensor | None]) -> Tensor:
    """The Gram matrix `Float64[k, k]` of k gradients of one parameter, on its device.

    The gradients may be of any float type; None stands for zero. Of a sharded parameter it is the
    term that this process's part adds; `gathered` adds the others.

    >>> gram([torch.tensor([3.0, 4.0]), None])
    tensor([[25.,  0.],
            [ 0.,  0.]], dtype=torch.float64)
    >>> spiky = torch.ones(1_000_000); spiky[0] = 1e4
    >>> gram([spiky]).item(), torch.dot(spiky, spiky).double().item() == 100999999.0
    (100999999.0, False)
    """
    present = [i for i, vector in enumerate(vectors) if vector is not None]
    flat = [distributed.local(vectors[i]).detach().reshape(-1) for i in present]  # type: ignore[arg-type]
    if len({vector.shape for vector in flat}) > 1:
        raise ValueError(
            f"`vectors` should have one shape. Found {[tuple(v.shape) for v in flat]}. "
            "Pass gradients of the same parameter."
        )
    products = _products(flat) if flat else torch.zeros(0, 0, dtype=torch.float64)
    if len(flat) == len(vectors):
        return products
    matrix = products.new_zeros(len(vectors), len(vectors))
    index = torch.tensor(present, dtype=torch.long, device=products.device)
    matrix[index.unsqueeze(1), index] = products
    return matrix


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
    each device is waited for once, and so is each mesh, however many parameters it shards.
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_device.setdefault(matrix.device, []).append(i)
    table = torch.zeros(len(matrices), *matrices[0].shape, dtype=torch.float64)
    for places in by_device.values():
        table[places] = torch.stack([matrices[i] for i in places]).cpu()
    for groups in dict.fromkeys(filter(None, over)):
        places = [i for i, own in enumerate(over) if own == groups]
        table[places] = distributed.summed(table[places], groups)
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


def _products(flat: Sequence[Tensor]) -> Tensor:
    size, device = flat[0].numel(), flat[0].device
    rows = torch.empty(len(flat), min(size, BLOCK), dtype=torch.float64, device=device)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=device)
    for start in range(0, size, BLOCK):
        block = rows[:, : min(BLOCK, size - start)]
        for row, vector in zip(block, flat, strict=True):
            row.copy_(vector[start : start + BLOCK])
        products.addmm_(block, block.T)
    return products
