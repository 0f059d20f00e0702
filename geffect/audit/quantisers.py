"""Quantisers: weights as codes of few bits, and what the codes stand for.

Those of deployment, in float32 and to the bit: `NF4` as bitsandbytes, `Q4_0` and `Q8_0` as gguf.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.codes import FLOATS
from geffect.numbers import is_whole

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""What the codes of NF4 stand for in a block whose largest weight is 1 (arXiv 2305.14314)."""


@dataclass(frozen=True)
class Codes:
    """Weights as a quantiser keeps them.

    - `codes`: `Int16[..., output, input]`.
    - `scale`: what a code is multiplied by, `Float32` of the same shape.
    - `values`: what the codes stand for, `Float32` of the same shape.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor


@dataclass(frozen=True)
class Quantiser(ABC):
    """A way to keep weights in few bits, called with those of one or several matrices.

    Weights are `Float[..., output, input]`. A quantiser of one's own says what the codes are:

    >>> class Sign(Quantiser):
    ...     name = "sign"
    ...     def _codes(self, weight):
    ...         scale = weight.abs().mean(-1, keepdim=True).expand_as(weight)
    ...         return weight.sign(), scale, weight.sign() * scale
    >>> Sign()(torch.tensor([[1.0, -3.0]])).values
    tensor([[ 2., -2.]])
    """

    name: ClassVar[str]
    multiple: ClassVar[int] = 1
    """Of what the number of inputs has to be a multiple: blocks do not go beyond a row."""

    def __call__(self, weight: Tensor) -> Codes:
        """The codes of weights, and their values.

        Raises ValueError for weights that are not finite, or that the format cannot hold.
        """
        if weight.dtype not in FLOATS or weight.ndim < 2:
            raise ValueError(
                "Weights should be numbers in floating point, with dimensions for outputs and "
                f"inputs. Found {weight.dtype} of shape {tuple(weight.shape)}. Pass the weight of "
                "a linear layer."
            )
        if not weight.numel():
            return Codes(weight.to(torch.int16), weight.float(), weight.float())
        if weight.shape[-1] % self.multiple:
            raise ValueError(
                f"Weights for {self.name} should have a multiple of {self.multiple} inputs. Found "
                f"{weight.shape[-1]}. Leave them as they are, as its library does."
            )
        if not weight.isfinite().all():
            raise ValueError(
                "Weights should be finite. Found NaN or infinity. Look at how the model was "
                "trained: a run that diverged leaves such."
            )
        codes, scale, values = self._codes(weight.detach().float())
        if not values.isfinite().all():
            raise ValueError(
                f"Weights should be such that {self.name} can hold their scale. Found one as large "
                f"as {weight.abs().max().item():.3g}. Choose another quantiser."
            )
        return Codes(codes.to(torch.int16), scale, values)

    @abstractmethod
    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and values of weights in float32."""


@dataclass(frozen=True)
class Int8(Quantiser):
    """Eight bits with a scale for each output: s = max |w| / 127, code = round(w / s).

    Halves are rounded to the even number.

    >>> Int8()(torch.tensor([[0.5, -0.21, 0.07, 0.02]])).values
    tensor([[ 0.5000, -0.2087,  0.0709,  0.0197]])
    """

    name: ClassVar[str] = "int8"

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = (weight.abs().amax(-1, keepdim=True) / 127).expand_as(weight)
        codes = _whole(weight, scale).clamp(-127, 127)
        return codes, scale, codes * scale


@dataclass(frozen=True)
class Int4(Quantiser):
    """Four bits with a scale for each group of inputs of an output: s = max |w| / 7.

    code = round(w / s), halves to the even number, from -8 to 7.

    - `group`: so many inputs share a scale; the last group of a row may be shorter.

    >>> Int4()(torch.tensor([[0.5, -0.21, 0.07, 0.02]])).values
    tensor([[ 0.5000, -0.2143,  0.0714,  0.0000]])
    """

    name: ClassVar[str] = "int4"
    group: int = 128

    def __post_init__(self) -> None:
        if not is_whole(self.group, 1):
            raise ValueError(
                f"`group` of Int4 should be a number of inputs, 1 or more. Found {self.group!r}. "
                "Pass 128, or 32 for a small model."
            )

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = _blocks(weight, self.group)
        whole = (blocks.abs().amax(-1, keepdim=True) / 7).expand_as(blocks)
        scale = whole.flatten(-2)[..., : weight.shape[-1]]
        codes = _whole(weight, scale).clamp(-8, 7)
        return codes, scale, codes * scale


@dataclass(frozen=True)
class NF4(Quantiser):
    """Four bits that stand for quantiles of a normal distribution (QLoRA, arXiv 2305.14314).

    Blocks of 64 of the flattened matrix have the scale s = max |w|; the value is s times the
    nearest of `LEVELS` to w / s. To the bit as bitsandbytes without its second quantisation, that
    of the scales, which adds a relative error of .002.

    >>> NF4()(torch.tensor([[0.5, -0.21, 0.07, 0.02], [1.0, 0.3, -0.6, -0.05]])).values
    tensor([[ 0.4407, -0.1848,  0.0796,  0.0000],
            [ 1.0000,  0.3379, -0.5251, -0.0911]])
    """

    name: ClassVar[str] = "nf4"

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = weight.flatten(-2)
        blocks = _blocks(flat, 64)
        largest = blocks.abs().amax(-1, keepdim=True)
        # As the library, which multiplies by the reciprocal; 0 and what has none are 0.
        share = (blocks * (1 / largest)).clamp(-1, 1).where(largest.reciprocal().isfinite(), 0.0)
        levels = torch.tensor(LEVELS, device=weight.device, dtype=torch.float32)
        above = torch.searchsorted(levels, share.contiguous()).clamp(1, len(levels) - 1)
        # Of two that are equally near the lower one.
        lower = (share - levels[above - 1]).abs() <= (share - levels[above]).abs()
        codes = above - lower.long()

        def laid_out(of_blocks: Tensor) -> Tensor:
            return of_blocks.flatten(-2)[..., : flat.shape[-1]].reshape(weight.shape)

        scale = largest.expand_as(blocks)
        return laid_out(codes), laid_out(scale), laid_out(levels[codes] * scale)


@dataclass(frozen=True)
class Q4_0(Quantiser):
    """Four bits of a GGUF file: blocks of 32 inputs, with the scale d = w_max / -8 in float16.

    w_max is the weight of largest magnitude, with its sign; code = trunc(w / d + 8.5), from 0 to
    15, with d in float32; the value is (code - 8) d. To the bit as gguf.

    >>> found = Q4_0()(torch.linspace(-2, 1, 32)[None])
    >>> found.codes[0, ::8], found.values[0, ::8]
    (tensor([0, 3, 6, 9], dtype=torch.int16), tensor([-2.0000, -1.2500, -0.5000,  0.2500]))
    """

    name: ClassVar[str] = "gguf_q4_0"
    multiple: ClassVar[int] = 32

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = _blocks(weight, 32)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        inverse = (1 / scale).where((1 / scale).isfinite(), 0.0)
        codes = (blocks * inverse + 8.5).trunc().clamp(0, 15)
        stored = scale.half().float().expand_as(blocks)
        parts = codes, stored, stored * (codes - 8)
        laid_out = [of_blocks.reshape(weight.shape) for of_blocks in parts]
        return laid_out[0], laid_out[1], laid_out[2]


@dataclass(frozen=True)
class Q8_0(Quantiser):
    """Eight bits of a GGUF file, by the package gguf, which is optional: blocks of 32 inputs.

    Raises ImportError without it.
    """

    name: ClassVar[str] = "gguf_q8_0"
    multiple: ClassVar[int] = 32

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError as error:
            raise ImportError(
                "`gguf` should be installed for gguf_q8_0. Found no such package. Run `pip install "
                "gguf`, or choose gguf_q4_0, which needs none."
            ) from error
        kind = GGMLQuantizationType.Q8_0
        kept = quants.quantize(weight.cpu().contiguous().numpy(), kind)
        blocks = kept.reshape(*weight.shape[:-1], -1, 34)  # two bytes of scale, and 32 codes
        codes = blocks[..., 2:].view(np.int8).reshape(weight.shape)
        scale = np.repeat(blocks[..., :2].view(np.float16).astype(np.float32), 32, axis=-1)
        values = quants.dequantize(kept, kind).reshape(weight.shape)
        return (
            torch.from_numpy(codes.copy()).to(weight.device),
            torch.from_numpy(scale.reshape(weight.shape)).to(weight.device),
            torch.from_numpy(values).to(weight.device),
        )


def _blocks(weight: Tensor, size: int) -> Tensor:
    """The last dimension in blocks, `Float[..., block, size]`; zeros fill up the last."""
    filled = F.pad(weight, (0, -weight.shape[-1] % size))
    return filled.view(*filled.shape[:-1], -1, size)


def _whole(weight: Tensor, scale: Tensor) -> Tensor:
    """Weights by their scale, rounded; 0 where that is 0, as where all are as good as 0."""
    quotient: Tensor = weight / scale
    return quotient.masked_fill(scale == 0, 0.0).round() + 0.0  # a code has no -0
