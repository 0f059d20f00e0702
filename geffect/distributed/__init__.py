"""The same step on several processes: DDP, where each holds the model whole, and FSDP2, in parts.

A gradient is averaged over the processes before any inner product is taken, because
`<mean u, mean r>` is not the mean of `<u, r>`. FSDP2 does that in its backward pass and leaves
DTensors. What a process computes of its parts alone adds up over the processes that hold the
others. In a program of one process nothing here does anything.
"""

from .agreement import Together, together
from .processes import (
    anywhere,
    from_first,
    is_writer,
    largest,
    mean,
    process_count,
    rank,
    token_share,
)
from .reduction import average, averages, check_layout, check_unsynchronised, gradient_sync
from .shards import at_rest, holders, is_sharded, local, local_range, shard_ranges, summed

__all__ = [
    "Together",
    "anywhere",
    "at_rest",
    "average",
    "averages",
    "check_layout",
    "check_unsynchronised",
    "from_first",
    "gradient_sync",
    "holders",
    "is_sharded",
    "is_writer",
    "largest",
    "local",
    "local_range",
    "mean",
    "process_count",
    "rank",
    "shard_ranges",
    "summed",
    "together",
    "token_share",
]
