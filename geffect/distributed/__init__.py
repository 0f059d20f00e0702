"""The same step on several processes: DDP, where each holds the model whole, and FSDP2, in parts.

A gradient is averaged over the processes before any inner product is taken, because
`<mean u, mean r>` is not the mean of `<u, r>`. FSDP2 does that in its backward pass and leaves
DTensors. What a process computes of its own parts adds up over the processes that hold the others.
In a program of one process nothing here does anything.
"""

from .agreement import Ranks, raise_on_all_ranks
from .engine import (
    backward,
    begin_micro_batch,
    is_in_engine,
    micro_batch,
    optimizer_behind,
    pieces,
    share_of,
    shares_forwards,
    take_over_step,
)
from .processes import (
    any_rank,
    broadcast,
    is_main_process,
    max_over_ranks,
    mean,
    rank,
    token_share,
    world_size,
)
from .reduction import (
    average,
    averages,
    check_layout,
    check_unsynchronised,
    gradient_sync,
    unsynchronised,
)
from .shards import (
    at_rest,
    expert_ranges,
    holders,
    is_first_holder,
    is_sharded,
    laid_out_like,
    local,
    local_range,
    local_rows,
    reshard,
    shape_of,
    shard_ranges,
    summed,
)

__all__ = [
    "Ranks",
    "any_rank",
    "at_rest",
    "average",
    "averages",
    "backward",
    "begin_micro_batch",
    "broadcast",
    "check_layout",
    "check_unsynchronised",
    "expert_ranges",
    "gradient_sync",
    "holders",
    "is_first_holder",
    "is_in_engine",
    "is_main_process",
    "is_sharded",
    "laid_out_like",
    "local",
    "local_range",
    "local_rows",
    "max_over_ranks",
    "mean",
    "micro_batch",
    "optimizer_behind",
    "pieces",
    "raise_on_all_ranks",
    "rank",
    "reshard",
    "shape_of",
    "shard_ranges",
    "share_of",
    "shares_forwards",
    "summed",
    "take_over_step",
    "token_share",
    "unsynchronised",
    "world_size",
]
