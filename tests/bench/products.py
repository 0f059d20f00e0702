"""What inner products are worth, and what sketches cost."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geffect import dots
from geffect.layers import describe
from geffect.objectives import nll
from geffect.sketch import Sketch

from .bars import Bar, Row
from .rounds import Ratio, ratio
from .workload import Workload


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """The cost of a sketch and the error of an inner product."""
    yield sketch(workload)
    yield accuracy("inner product", dots.gram, workload)
    yield accuracy("quick inner product", dots.quick_gram, workload)


def sketch(workload: Workload) -> Row:
    """The sketches of the layers of a gradient, beside one inner product with another gradient."""
    a, b = (_gradient(workload, side) for side in ("forget", "retain"))
    table, recipe = describe(workload.model), Sketch()

    def product() -> Tensor:
        return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True)])

    seconds = workload.seconds({"sketch": lambda: recipe.layers(a, table), "dot": product})
    return Row("sketch: time / torch.dot", ratio(seconds["sketch"], seconds["dot"]), Bar(6.0))


def accuracy(name: str, gram: Callable[[Sequence[Tensor]], Tensor], workload: Workload) -> Row:
    """The largest error over |a| |b|, on vectors some of whose coordinates dwarf the rest."""
    size = workload.size.vector
    errors = [
        relative_error(gram([a, b])[0, 1].item(), a, b)
        for numel in (size // 16, size)
        for a, b in heavy_tailed(numel, workload.device)
    ]
    return Row(f"{name}: error / |a| |b|", Ratio(max(errors), len(errors)), Bar(1e-6))


def heavy_tailed(numel: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of vectors: powers of normal numbers, one with itself, and two that share one spike."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(numel, generator=draw).pow(5).to(device) for _ in range(2))
    yield a, b
    yield a, a
    spiky = torch.randn(numel, generator=draw).abs().to(device)
    spiky[0] = 1e5
    yield spiky, spiky


def relative_error(found: float, a: Tensor, b: Tensor) -> float:
    """How far an inner product is off, as a share of the product of the norms."""
    return abs(found - exact(a, b)) / math.sqrt(exact(a, a) * exact(b, b))


def exact(a: Tensor, b: Tensor) -> float:
    """<a, b>, as exactly as there is a type for."""
    # A product of two float32 numbers is exact in float64; numpy adds in pairs.
    products = (a.double() * b.double()).cpu().numpy()
    return float(products.sum(dtype=np.longdouble))


def _gradient(workload: Workload, side: str) -> list[Tensor]:
    nll(workload.model, workload.pair[side]).backward()
    gradient = [parameter.grad for parameter in workload.parameters]
    workload.model.zero_grad()
    return gradient
