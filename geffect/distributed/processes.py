"""The processes that train together, and the numbers that they share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if _initialised() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes what all of them know."""
    return rank() == 0


def mean(values: Sequence[float]) -> list[float]:
    """The means over the processes, such as those of losses; not finite where one of them is not.

    >>> mean([2.0, 3.0])
    [2.0, 3.0]
    """
    if world_size() == 1:
        return list(values)
    total = all_reduce(torch.tensor(values, dtype=torch.float64))
    return (total / world_size()).tolist()


def token_share(tokens: int) -> float:
    """The factor that turns the mean over a process's tokens into one whose average is over all.

    processes · tokens / (tokens of all processes). Where processes have different numbers of
    labelled tokens, the mean of their means is not the mean over tokens. Multiply each loss by
    its share, `nll(model, batch) * token_share(count)`. `count` is how many tokens it is a mean of:
    `int((batch["labels"][:, 1:] != -100).sum())`, as no token is predicted first.

    >>> token_share(17)
    1.0
    """
    everyone = tokens
    if world_size() > 1:
        everyone = int(all_reduce(torch.tensor(tokens)))
    if everyone == 0:
        raise ValueError(
            "`tokens` should not be 0 on every process. Found no labelled token in this batch. "
            "Leave the batch out, on all processes."
        )
    return world_size() * tokens / everyone


def in_own_row(values: Sequence[float]) -> Tensor:
    """`Float64[process, value]`: summed over the processes, it has what each of them knows.

    What is not a number is infinite there.

    >>> in_own_row([2.0, float("nan")])
    tensor([[2., inf]], dtype=torch.float64)
    """
    table = torch.zeros(world_size(), len(values), dtype=torch.float64)
    own = torch.tensor(values, dtype=torch.float64)
    table[rank()] = own.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return table


def packed(tables: Sequence[Tensor]) -> Tensor:
    """The numbers of several tables in one, `Float64[n]`."""
    return torch.cat([table.double().flatten() for table in tables])


def unpacked(numbers: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tables again.

    >>> tables = [torch.ones(1, 2), torch.ones(1)]
    >>> unpacked(packed(tables) * 2, like=tables)
    [tensor([[2., 2.]], dtype=torch.float64), tensor([2.], dtype=torch.float64)]
    """
    ends = numbers.split([table.numel() for table in like])
    return [end.view_as(table) for end, table in zip(ends, like, strict=True)]


def any_rank(flag: bool) -> bool:
    """Whether it is so on any process.

    >>> any_rank(False)
    False
    """
    return flag if world_size() == 1 else bool(all_reduce(torch.tensor(int(flag))))


def max_over_ranks(value: float) -> float:
    """The largest number of all processes; infinite where one of them is not a number.

    >>> max_over_ranks(2.0), max_over_ranks(float("nan"))
    (2.0, inf)
    """
    peak = torch.tensor(value, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if world_size() > 1:
        peak = peak.to(device_of())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def broadcast(value: T) -> T:
    """What the first process has, on all of them. It has to be picklable.

    >>> broadcast({"next_step": 3})
    {'next_step': 3}
    """
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce(table: Tensor) -> Tensor:
    table = table.to(device_of())
    dist.all_reduce(table)
    return table


def device_of(group: "ProcessGroup | None" = None) -> torch.device:
    """Where a group exchanges numbers: on the CPU if it can, so that no kernel waits for them."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
