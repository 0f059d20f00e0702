"""Quantisers: against loops, against the libraries where they are installed, and pinned."""

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from geffect.audit.quantisers import LEVELS, NF4, Q4_0, Q8_0, Int4, Int8, Quantiser

Floats = NDArray[np.float32]

SMALL = torch.tensor([[0.50, -0.21, 0.07, 0.02], [1.0, 0.3, -0.6, -0.05]])
ALL = (Int8(), Int4(), Int4(32), NF4(), Q4_0())


def awkward(dtype: torch.dtype = torch.float32, scale: float = 0.02) -> Tensor:
    """Weights with rows and blocks of zeros, ties, signs in balance, and halves between codes."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)) * scale
    weight[0] = 0.0
    weight[1, :32] = -0.0
    weight[2, :32] = weight[2, 0]
    weight[3, :64] = torch.cat([weight[3, :32], -weight[3, :32]])
    weight[4] = torch.arange(96) * scale - 48 * scale
    weight[5] = torch.arange(-48, 48) / 14 * scale  # halves of int4
    return weight.to(dtype)


def in_blocks(row: Floats, size: int) -> list[Floats]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def scaled(row: Floats, most: int) -> list[tuple[int, float]]:
    one = np.float32(1)
    scale = max((abs(w) for w in row), default=one * 0) / np.float32(most)
    codes = [0 if scale == 0 else int(np.clip(np.rint(w / scale), -most - 1, most)) for w in row]
    return [(code, float(np.float32(code) * scale)) for code in codes]


def of_nf4(block: Floats) -> list[tuple[int, float]]:
    levels, largest = np.array(LEVELS, dtype=np.float32), np.abs(block).max()
    if largest == 0:
        return [(7, 0.0)] * len(block)
    shares = [np.clip(w * (np.float32(1) / largest), -1, 1) for w in block]
    codes = [int(np.argmin([abs(share - level) for level in levels])) for share in shares]
    return [(code, float(levels[code] * largest)) for code in codes]


def of_q4_0(block: Floats) -> list[tuple[int, float]]:
    largest = max(block, key=abs)  # the first of several
    scale = largest / np.float32(-8)
    inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
    codes = [int(np.clip(np.trunc(w * inverse + np.float32(8.5)), 0, 15)) for w in block]
    stored = np.float32(np.float16(scale))
    return [(code, float(stored * np.float32(code - 8))) for code in codes]


def naive(quantiser: Quantiser, weight: Floats) -> list[tuple[int, float]]:
    """Code and value of each weight, in order, by loops."""
    match quantiser:
        case Int8():
            return [x for row in weight for x in scaled(row, 127)]
        case Int4(group=group):
            return [x for row in weight for part in in_blocks(row, group) for x in scaled(part, 7)]
        case NF4():
            return [x for block in in_blocks(weight.ravel(), 64) for x in of_nf4(block)]
        case _:
            return [x for row in weight for block in in_blocks(row, 32) for x in of_q4_0(block)]


@pytest.mark.parametrize("quantiser", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.02, 1e-7, 40.0])
def test_a_loop_finds_the_same_bits(quantiser: Quantiser, dtype: torch.dtype, scale: float) -> None:
    weight = awkward(dtype, scale)
    found = quantiser(weight)
    codes, values = zip(*naive(quantiser, weight.float().numpy()), strict=True)
    assert found.values.flatten().tolist() == list(values)
    told = found.values.flatten() != 0  # the code of a value of 0 may be that of -0
    assert torch.equal(found.codes.flatten()[told], torch.tensor(codes, dtype=torch.int16)[told])


@pytest.mark.parametrize("quantiser", ALL, ids=str)
def test_values_are_what_codes_and_scales_say(quantiser: Quantiser) -> None:
    found = quantiser(awkward())
    levels = torch.tensor(LEVELS)
    steps = {"nf4": lambda c: levels[c.long()], "gguf_q4_0": lambda c: c - 8.0}
    step = steps.get(quantiser.name, torch.Tensor.float)(found.codes)
    assert torch.equal(step * found.scale, found.values)


@pytest.mark.parametrize(
    ("quantiser", "values"),
    [
        (Int8(), [[0.5, -0.2087, 0.0709, 0.0197]]),
        (Int4(), [[0.5, -0.2143, 0.0714, 0.0], [1.0, 0.2857, -0.5714, 0.0]]),
        (NF4(), [[0.4407, -0.1848, 0.0796, 0.0], [1.0, 0.3379, -0.5251, -0.0911]]),
    ],
    ids=str,
)
def test_pinned(quantiser: Quantiser, values: list[list[float]]) -> None:
    found = quantiser(SMALL).values[: len(values)]
    assert torch.allclose(found, torch.tensor(values), atol=5e-5)


@pytest.mark.parametrize(
    ("quantiser", "error"),
    [(Int8(), 0.0075), (NF4(), 0.0922), (Int4(512), 0.135), (Q4_0(), 0.086)],
    ids=str,
)
def test_relative_errors_of_normal_weights(quantiser: Quantiser, error: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    found = ((quantiser(weight).values - weight).norm() / weight.norm()).item()
    assert found == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("quantiser", [Q4_0(), Q8_0()], ids=str)
@pytest.mark.parametrize("scale", [0.02, 1e-7, 40.0])
def test_gguf_has_the_same_bits(quantiser: Quantiser, scale: float) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[quantiser.name.removeprefix("gguf_").upper()]
    weight = awkward(scale=scale)
    stored = gguf.quants.quantize(weight.numpy(), kind)
    found = quantiser(weight)
    right = gguf.quants.dequantize(stored, kind)
    assert found.values.numpy().view(np.int32).tolist() == right.view(np.int32).tolist()
    assert torch.equal(
        found.scale * (found.codes - (8 if "q4" in quantiser.name else 0)), found.values
    )


@pytest.mark.parametrize("scale", [0.02, 40.0])
def test_bitsandbytes_has_the_same_bits(scale: float) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # Whole blocks a row: with AVX-512, bitsandbytes 0.50 scales others by a wrong block's maximum.
    weight = awkward(scale=scale)[6:].reshape(-1, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(functional.dequantize_4bit(packed, state), NF4()(weight).values)


@pytest.mark.parametrize("quantiser", ALL, ids=str)
def test_matrices_side_by_side_are_those_alone(quantiser: Quantiser) -> None:
    weight = torch.stack([awkward(), awkward(scale=0.5)])
    both = quantiser(weight)
    for matrix, codes, values in zip(weight, both.codes, both.values, strict=True):
        assert torch.equal(quantiser(matrix).codes, codes)
        assert torch.equal(quantiser(matrix).values, values)


@pytest.mark.parametrize("quantiser", [Int8(), Int4(), Q4_0()], ids=str)
def test_what_is_rounded_stays_when_it_is_rounded_again(quantiser: Quantiser) -> None:
    once = quantiser(awkward())
    again = quantiser(once.values)
    assert torch.allclose(again.values, once.values, rtol=2e-3, atol=0)


@pytest.mark.parametrize("quantiser", ALL, ids=str)
def test_smallest_numbers_become_zeros(quantiser: Quantiser) -> None:
    found = quantiser(torch.full((2, 64), 1e-45))
    assert found.values.isfinite().all() and found.values.abs().max() <= 1e-45


def test_a_row_that_is_no_multiple_of_the_group_ends_with_a_shorter_one() -> None:
    row = awkward()[7:8, :70]
    parts = [Int4(32)(row[:, a:b]).values for a, b in ((0, 32), (32, 64), (64, 70))]
    assert torch.equal(Int4(32)(row).values, torch.cat(parts, dim=1))


@pytest.mark.parametrize("quantiser", ALL, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (4, 0)])
def test_a_layer_without_numbers_has_no_codes(quantiser: Quantiser, shape: tuple[int, int]) -> None:
    found = quantiser(torch.zeros(shape, dtype=torch.bfloat16))
    assert found.codes.shape == found.scale.shape == found.values.shape == shape
    assert (found.codes.dtype, found.values.dtype) == (torch.int16, torch.float32)


def test_weights_that_are_none_are_refused() -> None:
    for weight in (torch.ones(4, 32, dtype=torch.uint8), torch.ones(32), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"Weights should be numbers in floating point"):
            NF4()(weight)
    with pytest.raises(ValueError, match="Weights should be finite"):
        Int8()(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"a multiple of 32 inputs\. Found 4"):
        Q4_0()(SMALL)
    with pytest.raises(ValueError, match=r"can hold their scale\. Found one as large as 1e"):
        Q4_0()(torch.full((1, 32), 1e6))
    for group in (0, 2.5, True, "32"):
        with pytest.raises(ValueError, match="`group` of Int4"):
            Int4(group)  # type: ignore[arg-type]


def test_q8_0_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="`gguf` should be installed for gguf_q8_0"):
        Q8_0()(awkward())
    assert Q4_0()(awkward()).values.isfinite().all()
