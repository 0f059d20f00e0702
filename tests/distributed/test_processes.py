"""Numbers that two processes share, and one that has no partner."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from geffect import distributed
from tests.utils import two_ranks
from tests.utils.layouts import Small, fsdp


def numbers_on_a_rank() -> tuple[Any, ...]:
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="no labelled token"):
        distributed.token_share(0)
    return (
        distributed.rank(),
        distributed.is_main_process(),
        distributed.world_size(),
        distributed.token_share(1 + 2 * rank),
        distributed.mean([1.0 + rank, float("inf") if rank else 0.0]),
        distributed.broadcast({"next": 7} if rank == 0 else {}),
        distributed.averages(nn.Linear(2, 2)),
        distributed.averages(fsdp(Small())),
    )


def test_numbers_that_processes_share() -> None:
    means, first = [1.5, float("inf")], {"next": 7}
    assert two_ranks.run(numbers_on_a_rank) == [
        (0, True, 2, 0.5, means, first, True, False),
        (1, False, 2, 1.5, means, first, True, False),
    ]


def test_one_process_needs_no_partner() -> None:
    model, parameter = nn.Linear(2, 2), torch.ones(2, 3)
    vector = [parameter, None]
    assert distributed.average([parameter, parameter], {"forget": vector}) == {"forget": vector}
    assert distributed.holders(parameter) == ()
    assert distributed.is_main_process()
    distributed.check_layout(model)
    distributed.check_unsynchronised(model)
    with distributed.gradient_sync(model), distributed.raise_on_all_ranks():
        pass
