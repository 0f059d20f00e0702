"""What comes back from an encoding, bit by bit or on average, and how large it is meanwhile."""

from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from geffect.encodings import ENCODINGS
from tests.utils.far_device import Counted, FarTensor

EVERY = sorted(ENCODINGS)
QUANTISED = {"int8": (64, 127), "int4": (32, 7)}
SIZES = [0, 1, 31, 32, 33, 64, 65, 1000]

# Zeros, subnormals and the least and the largest numbers of float32 and of bfloat16.
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 9.2e-41, 1.2e-38, 3.4028e38, -3.3895e38, 1.0, float("inf"),
           float("-inf"), float("nan")]  # fmt: skip


def gradient(seed: int, rows: int = 100, columns: int = 257) -> Tensor:
    """Heavy tails, and rows of different scale."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(rows, 1, generator=draw))
    return (1e-4 * scale * torch.randn(rows, columns, generator=draw) ** 3).reshape(-1)


def decoded(name: str, x: Tensor, seed: int = 0) -> Tensor:
    encoding = ENCODINGS[name]
    found = encoding.decode(encoding.encode(x, seed), x.numel())
    assert found.dtype == np.float32
    return torch.from_numpy(found.copy())


def bits(x: Tensor) -> list[int]:
    found: list[int] = x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).tolist()
    return found


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("numel", SIZES)
def test_arrays_are_as_announced(name: str, numel: int) -> None:
    encoding, x = ENCODINGS[name], torch.linspace(-1, 2, numel)
    arrays = encoding.encode(x, seed=0)
    found = {array: (values.shape, values.dtype) for array, values in arrays.items()}
    assert found == encoding.arrays(numel)
    assert encoding.decode(arrays, numel).shape == (numel,)
    assert encoding.name == name


def test_bytes_of_float32() -> None:
    numel = 790_528
    arrays = {name: ENCODINGS[name].arrays(numel).values() for name in EVERY}
    stored = {n: sum(prod(s) * d.itemsize for s, d in those) for n, those in arrays.items()}
    share = {name: count / (4 * numel) for name, count in stored.items()}
    assert share["full"] == 1
    assert share["bf16"] == 0.5
    assert share["int8"] <= 0.27
    assert share["int4"] <= 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_keeps_every_bit(dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL).to(dtype)
    assert bits(decoded("full", x)) == bits(x.float())


def test_bf16_keeps_every_bit_of_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    encoded = ENCODINGS["bf16"].encode(every, seed=0)
    assert torch.equal(torch.from_numpy(encoded["bits"].view(np.int16)), every.view(torch.int16))
    # As torch widens it, but for the bits that are within a number that is none.
    found, number = decoded("bf16", every), ~every.isnan()
    assert bits(found[number]) == bits(every[number].float())
    assert torch.equal(found.isnan(), every.isnan())


def test_bf16_of_float32_rounds_to_nearest_even() -> None:
    step = 2.0**-7
    x = torch.tensor([1 + 0.4 * step, 1 + 0.6 * step, 1 + 0.5 * step, 1 + 1.5 * step])
    assert decoded("bf16", x).tolist() == [1, 1 + step, 1, 1 + 2 * step]
    special = torch.tensor(SPECIAL)
    assert bits(decoded("bf16", special)[:-1]) == bits(special.bfloat16().float()[:-1])
    assert decoded("bf16", special)[-1].isnan()


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_shared_with_the_gradient(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, dtype=dtype)
        arrays = ENCODINGS[name].encode(x, seed=0)
        x.zero_()
        assert (ENCODINGS[name].decode(arrays, 64) > 0.8).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("numel", [1, 33, 1000])
@pytest.mark.parametrize("scale", [1e-36, 1e-12, 1.0, 1e30])
def test_a_number_is_off_by_a_step_at_most(name: str, numel: int, scale: float) -> None:
    block, limit = QUANTISED[name]
    x = scale * gradient(1)[:numel] / gradient(1)[:numel].abs().max()
    found = decoded(name, x)
    for part, back in zip(x.split(block), found.split(block), strict=True):
        step = part.abs().max().item() / limit
        # Half a step to the nearest, a whole one at random; the scale of int4 is rounded up.
        most = 0.501 * step if name == "int8" else 1.009 * step
        assert (part - back).abs().max().item() <= most


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_stay_zeros(name: str) -> None:
    x = torch.zeros(200)
    x[150] = 1.0
    found = decoded(name, x)
    assert found.count_nonzero() == 1
    assert found[150] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_smallest_numbers_do_not_overflow_their_codes(name: str) -> None:
    x = torch.arange(-200, 200, dtype=torch.int32).abs().view(torch.float32)
    x[::2] *= -1
    assert (decoded(name, x).double() * x.double() >= 0).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_is_no_number(name: str, broken: float) -> None:
    block, _ = QUANTISED[name]
    x = torch.ones(3 * block)
    x[block + 5] = broken
    found = decoded(name, x)
    assert found[block : 2 * block].isnan().all()
    assert (found[:block] > 0.8).all()
    assert (found[2 * block :] > 0.8).all()


def test_int4_is_unbiased_over_seeds() -> None:
    x, draws = gradient(2)[:2000], 400
    mean = torch.stack([decoded("int4", x, seed) for seed in range(draws)]).double().mean(dim=0)
    step = torch.cat([part.abs().max().expand(len(part)) for part in x.split(32)]) / 7
    off = (mean - x).double() / step
    # The mean of 400 draws that are at most a step apart, over 2,000 coordinates.
    assert off.abs().max() < 5 * 0.5 / draws**0.5
    assert abs(off.mean()) < 5 * 0.5 / (draws * len(x)) ** 0.5


def test_what_int4_draws_follows_from_the_seed() -> None:
    x = gradient(3)
    first, again, other = (decoded("int4", x, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Of two seeds the errors do not know of each other; of one they would be the same.
    errors = torch.stack([first - x, other - x]).double()
    assert abs(torch.corrcoef(errors)[0, 1]) < 0.3


@pytest.mark.parametrize("name", EVERY)
def test_cosines_are_as_exact_as_stated(name: str) -> None:
    errors = []
    for i in range(20):
        common = gradient(3 * i)
        a, b = gradient(3 * i + 1) + common, gradient(3 * i + 2) + common
        found = decoded(name, a, 2 * i).double() @ decoded(name, b, 2 * i + 1).double()
        lengths = a.double().norm() * b.double().norm()
        errors.append(((found - a.double() @ b.double()) / lengths).item())
    stated = ENCODINGS[name].error / len(common) ** 0.5
    assert np.sqrt(np.mean(np.square(errors))) <= stated
    assert name == "full" or np.sqrt(np.mean(np.square(errors))) >= stated / 20


def test_a_gradient_longer_than_what_is_done_at_a_time() -> None:
    x = torch.ones(2**18 + 100)
    x[-100:] = 2.0
    for name in QUANTISED:
        torch.testing.assert_close(decoded(name, x), x, rtol=0.15, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_part_of_a_larger_tensor(name: str) -> None:
    x = gradient(4).requires_grad_()
    assert torch.equal(decoded(name, x[100:227]), decoded(name, x[100:227].clone()))


@pytest.mark.parametrize("name", ["full", "bf16", "int8"])
def test_a_vector_is_encoded_where_it_lies_and_fetched_encoded(name: str) -> None:
    """No more bytes leave the device than are stored, and it is asked once for each array."""
    x, fetched = gradient(0), []

    def fetch(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, FarTensor)
        fetched.append(tensor.held)
        return tensor.cpu()

    expected = ENCODINGS[name].encode(x, 0)
    with Counted() as counted:
        found = ENCODINGS[name].encode(FarTensor(x.clone()), 0, fetch)
    assert counted.waits.total() == len(fetched) == len(expected)
    for array, values in expected.items():
        assert np.array_equal(found[array], values)
    padded = 64 * 4  # the last block is filled up, and has a scale
    assert sum(t.nbytes for t in fetched) <= sum(a.nbytes for a in expected.values()) + padded
