"""Averages over two processes, and models that cannot be averaged loss by loss."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from geffect import distributed
from geffect.distributed import reduction
from tests.utils import two_ranks
from tests.utils.layouts import Small, ddp
from tests.utils.shares import batch, token_means


def averages_on_a_rank() -> list[list[list[Any]]]:
    return [averages_in_portions(bucket_bytes) for bucket_bytes in (1, 20, 2**20)]


def averages_in_portions(bucket_bytes: int) -> list[list[Any]]:
    reduction.BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()
    parameters = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(5), torch.zeros(2), torch.zeros(4)]
    parameters[3] = parameters[3].bfloat16()
    shared = [
        torch.arange(3.0) + rank,
        (torch.arange(4.0).view(2, 2) * (1 + rank)).t(),
        None if rank else torch.full((5,), 4.0),
        torch.full((2,), 1.0 + 2 * rank, dtype=torch.bfloat16),
        None,
    ]
    alone = [None, None, torch.ones(5), None, None, torch.full((1 + rank,), 7.0)]
    answer = distributed.average(parameters, {"forget": shared, "retain": alone})
    return [[None if x is None else x.tolist() for x in vector] for vector in answer.values()]


def test_averages_do_not_depend_on_portions_or_on_what_is_absent() -> None:
    shared = [[0.5, 1.5, 2.5], [[0.0, 3.0], [1.5, 4.5]], [2.0] * 5, [2.0, 2.0], None]
    for rank, portions in enumerate(two_ranks.run(averages_on_a_rank)):
        # What follows the parameters' tensors is of one process only.
        alone = [None, None, [1.0] * 5, None, None, [7.0] * (1 + rank)]
        assert portions == [[shared, alone]] * 3


def checks_on_a_rank() -> None:
    model = ddp(Small())
    own = batch("forget", dist.get_rank())
    with model.no_sync():
        token_means(model, "forget", own)
    distributed.check_unsynchronised(model)
    token_means(model, "forget", own)
    with pytest.raises(RuntimeError, match=r"inside `with model.no_sync\(\):`. Found .*Put the"):
        distributed.check_unsynchronised(nn.Sequential(model))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    with pytest.raises(ValueError, match=r"should span all processes. Found a process group of 1"):
        distributed.check_layout(DistributedDataParallel(Small(), process_group=alone))
    with pytest.raises(ValueError, match=r"`fully_shard` \(FSDP2\). Found .*Call fully_shard"):
        distributed.check_layout(FullyShardedDataParallel(nn.Linear(2, 2), device_id="cpu"))


def test_what_leaves_no_gradient_of_each_loss_is_refused() -> None:
    two_ranks.run(checks_on_a_rank)
