"""How a gradient is written down: in a whole, a half, a quarter or an eighth of float32.

A gradient is encoded by torch, where it lies, and decoded without torch. `ENCODINGS` has the ways
by name. The error is the root mean square of that of the cosine of two decoded gradients of 790,528
coordinates, in rows of different scale: normal ones, and cubes of normal ones, with heavy tails.

    encoding   bytes / float32   error   heavy tails   how
    full            1            0       0
    bf16            0.50         5e-6    3e-5          the upper half of float32
    int8            0.266        2e-5    5e-5          in blocks of 64, to the nearest
    int4            0.141        4e-4    2e-3          in blocks of 32, up or down at random

These errors are taken with the norms of the true gradients, which are in the Gram matrix of a run.
Noise makes a rounded vector longer: cosines of int4 with its own norms are too small by a few
percent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Generator, Tensor

Arrays = Mapping[str, NDArray[Any]]
"""One encoded vector: its arrays by name."""

Fetch = Callable[["Tensor"], "Tensor"]
"""Brings a tensor to the CPU."""

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and the type of each array of an encoded vector."""

_IN_CACHE = 2**18  # coordinates that a CPU quantises at a time
_AT_ONCE = 2**24  # coordinates that an accelerator does
_SMALLEST = 2.0**-149  # positive float32


def at_once(tensor: "Tensor") -> "Tensor":
    """The tensor on the CPU, once it is there."""
    return tensor.cpu()


class Encoding(Protocol):
    """A way to write a vector down. The arrays share no memory with the vector."""

    name: str
    error: float  # of a cosine, times the root of the number of coordinates; with heavy tails
    loss: float  # the longest that a change of the vector can be, in parts of its norm

    def arrays(self, numel: int) -> Layout:
        """What an encoded vector of `numel` coordinates consists of."""

    def encode(self, flat: "Tensor", seed: int, fetch: Fetch = at_once) -> Arrays:
        """The arrays of a vector of one axis; what is drawn at random follows from `seed`.

        Vectors with one seed are rounded alike, and their inner product shows it: give each source,
        step and layer its own. All is computed where the vector lies; `fetch` brings what is left
        to the CPU, and may fill the arrays later.
        """

    def decode(self, arrays: Arrays, numel: int) -> NDArray[np.float32]:
        """The vector, as near as the arrays have it."""


class Full:
    """float32, as it is.

    >>> import torch
    >>> Full().decode(Full().encode(torch.tensor([0.1, -0.0]), seed=0), numel=2)
    array([ 0.1, -0. ], dtype=float32)
    """

    name = "full"
    error = 0.0
    loss = 0.0

    def arrays(self, numel: int) -> Layout:
        """A number a coordinate."""
        return {"values": ((numel,), np.dtype("<f4"))}

    def encode(self, flat: "Tensor", seed: int, fetch: Fetch = at_once) -> Arrays:
        """A copy of the numbers."""
        import torch

        exact = flat.detach().to(torch.float32, copy=flat.device.type == "cpu")
        return {"values": fetch(exact).numpy()}

    def decode(self, arrays: Arrays, numel: int) -> NDArray[np.float32]:
        """The numbers themselves."""
        return arrays["values"]


class BFloat16:
    """The upper half of float32, rounded to nearest even; bfloat16 itself bit by bit.

    HDF5 and NumPy have no such type, so its 16 bits are kept as an unsigned integer.

    >>> import torch
    >>> BFloat16().encode(torch.tensor([1.0, -0.0]), seed=0)
    {'bits': array([16256, 32768], dtype=uint16)}
    """

    name = "bf16"
    error = 0.03
    loss = 2.0**-8

    def arrays(self, numel: int) -> Layout:
        """A pattern of bits a coordinate."""
        return {"bits": ((numel,), np.dtype("<u2"))}

    def encode(self, flat: "Tensor", seed: int, fetch: Fetch = at_once) -> Arrays:
        """The bits, taken by torch: NumPy would be many times slower."""
        import torch

        rounded = flat.detach().to(torch.bfloat16, copy=True)
        return {"bits": fetch(rounded.view(torch.int16)).numpy().view(np.uint16)}

    def decode(self, arrays: Arrays, numel: int) -> NDArray[np.float32]:
        """The numbers that begin with these bits."""
        return _widened(arrays["bits"])


class Int8:
    """Whole numbers up to 127, to the nearest, times a scale for each block of 64.

    A block with a number in it that is not finite is NaN.

    >>> import torch
    >>> Int8().decode(Int8().encode(torch.tensor([12.7, 0.12]), seed=0), numel=2)
    array([12.7,  0.1], dtype=float32)
    """

    name = "int8"
    error = 0.05
    loss = 0.04  # 64 halves of a scale, beside one number of 127 scales

    def arrays(self, numel: int) -> Layout:
        """A byte a coordinate, and the scales."""
        return {
            "codes": ((numel,), np.dtype("i1")),
            "scales": ((-(-numel // 64),), np.dtype("<f4")),
        }

    def encode(self, flat: "Tensor", seed: int, fetch: Fetch = at_once) -> Arrays:
        """Codes and scales; nothing is drawn at random."""
        import torch

        codes, scales = [], []
        for block in _blocks(flat, 64):
            scales.append(_scale(block, 127))
            codes.append(_divided(block, scales[-1]).round_().clamp_(-127, 127).to(torch.int8))
        return {
            "codes": _joined(codes, fetch)[: flat.numel()],
            "scales": _joined(scales, fetch),
        }

    def decode(self, arrays: Arrays, numel: int) -> NDArray[np.float32]:
        """Each code times the scale of its block."""
        return _multiplied(arrays["codes"], arrays["scales"], 64, numel)


class Int4:
    """Whole numbers up to 7, up or down at random, times a scale for each block of 32.

    Both neighbours are as likely as they are near: the mean over seeds is the vector, and so
    errors cancel in inner products. A block with a number that is not finite is NaN.

    >>> import torch
    >>> Int4().decode(Int4().encode(torch.tensor([7.0, -3.0, 0.0]), seed=0), numel=3)
    array([ 7., -3.,  0.], dtype=float32)
    """

    name = "int4"
    error = 1.5
    loss = 0.9  # 32 whole scales, beside one number of some 7

    def arrays(self, numel: int) -> Layout:
        """A byte for two coordinates, the first in its lower half, and the scales as bfloat16."""
        return {
            "codes": ((-(-numel // 2),), np.dtype("u1")),
            "scales": ((-(-numel // 32),), np.dtype("<u2")),
        }

    def encode(self, flat: "Tensor", seed: int, fetch: Fetch = at_once) -> Arrays:
        """Codes and scales."""
        import torch

        generator = torch.Generator(flat.device).manual_seed(seed)
        codes, scales = [], []
        for block in _blocks(flat, 32):
            # Rounded up, so that no code is beyond 7.
            bits = (_scale(block, 7).view(torch.int32) + 0xFFFF) >> 16
            scaled = _divided(block, (bits << 16).view(torch.float32))
            code = scaled.add_(_uniform(scaled, generator)).floor_().clamp_(-7, 7)
            low, high = code.add_(8).view(-1, 2).unbind(1)
            codes.append(low.add(high, alpha=16).to(torch.uint8))
            scales.append(bits.to(torch.int16))
        return {
            "codes": _joined(codes, fetch)[: -(-flat.numel() // 2)],
            "scales": _joined(scales, fetch).view(np.uint16),
        }

    def decode(self, arrays: Arrays, numel: int) -> NDArray[np.float32]:
        """Each code times the scale of its block."""
        pairs = arrays["codes"]
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1).view(np.int8) - np.int8(8)
        return _multiplied(codes, _widened(arrays["scales"]), 32, numel)


ENCODINGS: Mapping[str, Encoding] = {way.name: way for way in (Full(), BFloat16(), Int8(), Int4())}
"""The ways to write a gradient down, by the names that users give them."""


def _blocks(flat: "Tensor", size: int) -> "Iterator[Tensor]":
    """The vector cut into rows of `size`, the last filled up with zeros; copies, many at a time."""
    import torch

    at_once = _IN_CACHE if flat.device.type == "cpu" else _AT_ONCE
    for start in range(0, max(1, flat.numel()), at_once):
        part = flat.detach()[start : start + at_once]
        block = part.new_zeros(-(-part.numel() // size), size, dtype=torch.float32)
        block.view(-1)[: part.numel()] = part
        yield block


def _scale(block: "Tensor", limit: int) -> "Tensor":
    """What the largest number of each row is `limit` times; NaN where one is not finite."""
    scale = block.abs().amax(dim=1).div_(limit)
    return scale.masked_fill_(~scale.isfinite(), float("nan"))


def _divided(block: "Tensor", scale: "Tensor") -> "Tensor":
    """The rows in units of their scales; zero where there is none, or none that is a number."""
    return block.div_(scale.clamp_min(_SMALLEST).unsqueeze(1)).nan_to_num_(nan=0.0)


def _uniform(like: "Tensor", generator: "Generator") -> "Tensor":
    """Uniform between 0 and 1, in 65,536 steps: four from one draw, which takes the time."""
    import torch

    draws = torch.empty(like.numel() // 4, dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16).view_as(like).add(2**15 + 0.5).mul_(2.0**-16)


def _joined(parts: "Sequence[Tensor]", fetch: Fetch) -> NDArray[Any]:
    import torch

    joined: NDArray[Any] = fetch(torch.cat([part.view(-1) for part in parts])).numpy()
    return joined


def _widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """What bfloat16 with these bits is in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _multiplied(
    codes: NDArray[Any], scales: NDArray[Any], size: int, numel: int
) -> NDArray[np.float32]:
    """The first `numel` codes, each times the scale of its block of `size`."""
    values = codes[:numel].astype(np.float32)
    whole = numel // size
    rows = values[: whole * size].reshape(whole, size)
    rows *= scales[:whole, np.newaxis]
    values[whole * size :] *= scales[whole:]
    return values
