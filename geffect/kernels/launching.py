"""How kernels are launched: a program a tile of the coordinates, with a row for its results."""

from typing import Any

import torch
import triton
from torch import Tensor

MOST = 8
"""Vectors that a kernel reads together."""

TILE = 2048
"""Coordinates that a program of a kernel looks at which takes each coordinate by itself."""


def launch(kernel: Any, size: int, *arguments: Any, tile: int = TILE, **constants: int) -> None:
    """Run a kernel over so many coordinates, on the device of its first argument."""
    if size:
        _launch(kernel, triton.cdiv(size, tile), *arguments, **constants, TILE=tile)


def rows_for(vector: Tensor, side: int, *, tile: int = TILE) -> Tensor:
    """Room for a matrix `Float64[side, side]` from each program over the vector."""
    programs = triton.cdiv(vector.numel(), tile)
    return vector.new_empty(programs, side, side, dtype=torch.float64)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[programs,](*arguments, **constants, num_warps=8)
