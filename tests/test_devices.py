"""How tensors are walked over by the device on which they lie."""

import sys

import pytest
import torch

from geffect import devices, dots
from geffect.dots import BLOCK
from tests.utils.far_device import Counted, FarTensor


def test_a_cpu_has_no_kernels_and_does_not_ask_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geffect.kernels", None)
    assert not devices.has_kernels(torch.ones(2))
    assert dots.gram([torch.ones(2)]).item() == 2


def test_other_devices_are_walked_in_large_blocks() -> None:
    assert devices.at_a_time(torch.ones(2), cached=BLOCK) == BLOCK
    assert devices.at_a_time(FarTensor(torch.ones(2)), cached=BLOCK) == 2**24


@pytest.mark.parametrize("size", [0, 1, BLOCK + 1, 3 * BLOCK])
def test_a_device_without_kernels_has_the_same_products(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LARGE", 2 * BLOCK + 7)
    a, b = torch.randn(2, size).double()
    with Counted() as counted:
        found = dots.gram([FarTensor(a.bfloat16()), FarTensor(b.float())]).cpu()
    assert counted.launches["addmm_"] == -(-size // (2 * BLOCK + 7))
    a, b = a.bfloat16().double(), b.float().double()
    expected = torch.stack([a, b]) @ torch.stack([a, b]).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_a_cpu_without_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.int8)
    assert devices.out_of_memory(refused.value) and devices.out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not devices.out_of_memory(other.value)
