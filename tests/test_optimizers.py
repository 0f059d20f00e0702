"""What an optimizer steps, and which optimizers are refused."""

from typing import Any

import pytest
import torch
from torch import nn

from geffect.optimizers import check_descends, moved_by, tensors_of


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]


def test_what_an_optimizer_holds_and_what_it_moves() -> None:
    a, b = pair()
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    b.grad = torch.ones_like(b)
    assert [id(p) for p in tensors_of(optimizer)] == [id(a), id(b)]
    assert [id(p) for p in moved_by(optimizer)] == [id(b)]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_one_group_that_climbs_is_enough(kind: Any) -> None:
    a, b = pair()
    check_descends(kind([a], lr=0.1))
    climbing = kind([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)
    with pytest.raises(ValueError, match=r"`maximize` of .* should be False.* Found .*Negate"):
        check_descends(climbing)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_negative_learning_rate_climbs(make: Any) -> None:
    """Torch refuses one where the optimizer is made, and takes one that is set afterwards."""
    a, b = pair()
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    group = optimizer.param_groups[1]
    for fine in (0.0, 1e-9):
        group["lr"] = make(fine)
        check_descends(optimizer)
    group["lr"] = make(-1e-9)
    with pytest.raises(ValueError, match=r"rate of SGD should not be negative.* Found -.* Negate"):
        check_descends(optimizer)
    group["initial_lr"] = 0.1
    group["lr"] = make(-1e-9)  # what rounding leaves of a schedule that ends at zero
    check_descends(optimizer)
    group["lr"] = make(-1e-3)
    with pytest.raises(ValueError, match=r"should not be negative.* Found -0\.00.* Negate"):
        check_descends(optimizer)
