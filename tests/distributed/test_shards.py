"""What a process holds of a sharded tensor, and inner products of such parts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from geffect import distributed, dots
from tests.utils import two_ranks


def parts_on_a_rank() -> list[tuple[bool, tuple[int, int]]]:
    mesh = init_device_mesh("cpu", (two_ranks.RANKS,))
    found = []
    for shape in SHAPES:
        whole = torch.arange(float(np.prod(shape))).view(shape)
        sharded = distribute_tensor(whole, mesh, [Shard(0)])
        start, stop = distributed.local_range(sharded)
        part = distributed.local(sharded)
        same = torch.equal(part.flatten(), whole.flatten()[start:stop])
        found.append((same and part.data_ptr() == sharded.to_local().data_ptr(), (start, stop)))
    return found


SHAPES = [(15, 8), (4, 4), (1, 4), (3,), (2, 3, 2)]


def test_a_process_knows_where_its_part_begins_and_ends() -> None:
    first, second = two_ranks.run(parts_on_a_rank)
    assert all(right for right, _ in first + second)
    assert [held for _, held in first] == [(0, 64), (0, 8), (0, 4), (0, 2), (0, 6)]
    assert [held for _, held in second] == [(64, 120), (8, 16), (4, 4), (2, 3), (6, 12)]


def ranges_on_a_rank() -> tuple[Any, Any]:
    whole = torch.ones(3, 4)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    copies = init_device_mesh("cpu", (2, 1))
    copied = distribute_tensor(whole, copies, [Replicate(), Shard(0)])
    both = distributed.shard_ranges([whole, sharded, copied])
    return both, dots.grams([[whole], [sharded], [copied]]).flatten().tolist()


def test_each_part_is_kept_once_and_counted_once() -> None:
    for ranges, squares in two_ranks.run(ranges_on_a_rank):
        assert ranges == (((0, 12), (0, 8), (0, 12)), ((0, 0), (8, 12), (0, 0)))
        assert squares == [12.0, 12.0, 12.0]


def refusals_on_a_rank() -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)])
    rows = distribute_tensor(torch.ones(2, 4), mesh, [Shard(0)])
    term = DTensor.from_local(torch.ones(2, 4), mesh, [Partial()])
    assert dots.grams([[columns, None]])[0].tolist() == [[8.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"sharded along its first dimension.*Record Gram"):
        distributed.local_range(columns)
    with pytest.raises(ValueError, match=r"be summed up before .*Found .*Partial.*Redistribute"):
        dots.grams([[term]])
    with pytest.raises(ValueError, match="split over the processes alike"):
        dots.grams([[rows, columns]])


def test_what_has_no_inner_product_is_refused() -> None:
    two_ranks.run(refusals_on_a_rank)
