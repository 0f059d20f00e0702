"""How large coordinates are beside what they usually are, and where that reaches a threshold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


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
    launch(
        _salience,
        out.numel(),
        gradient,
        gradient if square is None else square,
        gradient if places is None else places,
        gradient if threshold is None else threshold,
        out,
        out.numel(),
        share,
        epsilon,
        SQUARE=square is not None,
        PLACES=places is not None,
    )


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
