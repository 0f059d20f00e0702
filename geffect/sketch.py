"""The sketch of a gradient: a few thousand numbers that keep its inner products with others.

The random signs and places come from hashes, never from a generator whose stream another version,
device or rank would change: sketches made anywhere from one recipe compare with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geffect.layers import Parameter, layers_of

if TYPE_CHECKING:
    from torch import Tensor, device

VERSION = 1

_WINDOW = 2**22  # the signs of as many coordinates, at most, are one stretch of the table
_IN_CACHE = 2**18  # coordinates that a CPU adds up at a time


@dataclass(frozen=True)
class Sketch:
    """A linear map S from gradients to `width` numbers with E <S a, S b> = <a, b>: the signed fold.

    Coordinate i of a tensor is added, times a random sign s(i), to number h(i) of the sketch:

        (S a)[j] = sum of s(i) a[i] over the i with h(i) = j,    h(i) = (i + shift) mod p

    with p the largest prime up to `width`. A plain fold, with p a power of two, would put all of a
    heavy column of a weight matrix into one number. The signs are a stretch of a long random table;
    where it begins, and the shift, are hashes of the seed and of the parameter's name.

    Over the draw of the signs, an inner product varies by Var = (|a|^2 |b|^2 + <a, b>^2) / width,
    and a cosine c by (1 - c^2)^2 / width; see `error`. Sketches compare where seed, width and
    version are equal.

    >>> import torch
    >>> a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    >>> sketch = Sketch(seed=3)
    >>> found = cosine(*(sketch.fold(x, "head.weight").numpy() for x in (a, a + b)))
    >>> bool(abs(found - torch.cosine_similarity(a, a + b, dim=0).item()) < 3 * error(4096))
    True
    """

    seed: int = 0
    width: int = 4096
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 2 <= self.width <= _IN_CACHE:
            raise ValueError(
                f"`width` should be between 2 and {_IN_CACHE}. Found {self.width}. The error of a "
                "cosine is about 1 / sqrt(width); 4096 is a good start."
            )
        if self.version != VERSION:
            raise ValueError(
                f"`version` should be {VERSION}. Found {self.version}. Use the version of geffect "
                "that made the sketches."
            )

    def fold(self, flat: "Tensor", name: str, start: int = 0) -> "Tensor":
        """The sketch `Float32[width]`, on its device, of a flattened parameter tensor.

        `flat` may be a part of the tensor, beginning at coordinate `start` of the whole: the
        sketches of its parts, on any number of ranks, add up to that of the whole.

        >>> import torch
        >>> whole = torch.arange(10.0)
        >>> parts = [Sketch().fold(whole[:3], "w"), Sketch().fold(whole[3:], "w", start=3)]
        >>> torch.equal(sum(parts), Sketch().fold(whole, "w"))
        True
        """
        import torch

        flat = flat.detach()
        stop = start + flat.numel()
        period = _largest_prime(self.width)
        window = _WINDOW // period * period
        shift, *offsets = self._hashes(name, 1 + -(-stop // window))
        signs = _signs(self.seed, self.version, flat.device)
        at_once = _IN_CACHE if flat.device.type == "cpu" else _WINDOW
        # A row of `period` coordinates is one round of the fold. Rounds are summed last, so that
        # signs, gradient and sum go by once and together.
        rounds = min(-(-(start % period + flat.numel()) // period), at_once // period)
        sums = flat.new_zeros(rounds * period, dtype=torch.promote_types(flat.dtype, torch.float32))
        at = start
        while at < stop:
            stretch, inside = divmod(at, window)
            index = at % period
            count = min(stop - at, window - inside, len(sums) - index)
            first = offsets[stretch] + inside
            sums[index : index + count].addcmul_(
                flat[at - start : at - start + count], signs[first : first + count]
            )
            at += count
        folded = sums.new_zeros(self.width, dtype=torch.float32)
        folded[:period] = sums.view(-1, period).sum(0).roll(shift % period)
        return folded

    def layers(
        self, vectors: "Sequence[Tensor | None]", parameters: Sequence[Parameter]
    ) -> "Tensor":
        """The sketches `Float32[layer, width]` of a gradient of the model, on the CPU.

        One tensor a parameter, None for zero; layers in the order in which the parameters first
        name them. The tensors of a layer are one long vector: its sketch is the sum of theirs.
        """
        import torch

        index = {layer: i for i, layer in enumerate(layers_of(parameters))}
        nothing = torch.zeros(len(index), self.width, dtype=torch.float32, device="cpu")
        # One sum a device: each is waited for once.
        sums: dict[device, Tensor] = {}
        for vector, parameter in zip(vectors, parameters, strict=True):
            if vector is None:
                continue
            if vector.device not in sums:
                sums[vector.device] = nothing.to(vector.device, copy=True)
            folded = self.fold(vector.detach().reshape(-1), parameter.name)
            sums[vector.device][index[parameter.layer]] += folded
        return sum((part.cpu() for part in sums.values()), nothing)

    def _hashes(self, name: str, count: int) -> list[int]:
        """The first `count` of the endless row of hashes of a parameter."""
        digest = shake_256(f"{self.version}/{self.seed}/{name}".encode()).digest(4 * count)
        hashes: list[int] = (np.frombuffer(digest, "<u4") % _WINDOW).tolist()
        return hashes


def inner(a: ArrayLike, b: ArrayLike) -> Any:
    """<a, b> of every sketch of `a` with every one of `b`; the width is their last axis.

    >>> inner([[1, 2, 0], [0, 1, 1]], [1, 1, 1])
    array([3., 2.])
    """
    return np.inner(np.asarray(a, np.float64), np.asarray(b, np.float64))


def cosine(a: ArrayLike, b: ArrayLike) -> Any:
    """<a, b> / (|a| |b|) of every sketch of `a` with every one of `b`, NaN where one is zero.

    Norms are those of the sketches. Their errors cancel a part of that of the inner product: what
    is aligned is found aligned.

    >>> cosine([[1, 2], [0, 0]], [2, 4])
    array([ 1., nan])
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    return np.inner(*directions).clip(-1, 1)


def error(width: int, cosine: ArrayLike = 0.0) -> NDArray[np.float64]:
    """The standard error of a cosine that was found in sketches: (1 - cosine^2) / sqrt(width).

    >>> error(4096), error(4096, 0.5)
    (np.float64(0.015625), np.float64(0.01171875))
    """
    found: NDArray[np.float64] = (1 - np.square(cosine)) / np.sqrt(width)
    return found


@lru_cache(maxsize=4)
def _signs(seed: int, version: int, device: "device") -> "Tensor":
    """The table of random signs: room for a window that begins anywhere in its first half."""
    import torch

    digest = shake_256(f"{version}/{seed}".encode()).digest(2 * _WINDOW // 8)
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(digest, np.uint8)))
    return bits.to(device, torch.float32).mul_(2).sub_(1)


@lru_cache
def _largest_prime(limit: int) -> int:
    """The largest prime up to `limit`."""
    return next(n for n in range(limit, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
