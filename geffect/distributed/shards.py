"""Shards: which part of a tensor a process holds, and what the parts add up to."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import all_gather, device_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Range = tuple[int, int]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a process may hold no more than a part of the tensor. Its shape is that of all."""
    # Not imported here: half a second, for programs that have no such tensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not copied: its part, which may be empty, or all of it.

    >>> whole = torch.ones(2)
    >>> local(whole) is whole
    True
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_range(tensor: Tensor) -> Range:
    """Where `local(tensor)` begins and ends in the flattened whole.

    >>> local_range(torch.ones(2, 3))
    (0, 6)
    """
    if not is_sharded(tensor):
        return 0, tensor.numel()
    dims = _sharded_dims(tensor)
    if not dims:
        return 0, tensor.numel()
    if len(dims) > 1 or not tensor.placements[dims[0]].is_shard(0):
        raise ValueError(
            "A tensor should be sharded along its first dimension, once, for its part to be one "
            f"piece of the whole. Found {tensor.placements}. Record Gram matrices only, which add "
            "up over any parts, or shard with the default placement of `fully_shard`."
        )
    first, last = local_rows(tensor)
    row = tensor.numel() // max(tensor.shape[0], 1)
    return first * row, last * row


def local_rows(tensor: Tensor) -> Range:
    """Which of its rows this process holds, whole or in part, of a tensor with dimensions.

    >>> local_rows(torch.ones(2, 3))
    (0, 2)
    """
    rows: int = tensor.shape[0]
    if not is_sharded(tensor):
        return 0, rows
    along = [dim for dim in _sharded_dims(tensor) if tensor.placements[dim].is_shard(0)]
    if not along:
        return 0, rows
    if len(along) > 1:
        raise ValueError(
            "A tensor of several experts should be sharded along its first dimension at most "
            f"once. Found {tensor.placements}. Shard it over one dimension of the mesh."
        )
    mesh, each = tensor.device_mesh, -(-rows // tensor.device_mesh.size(along[0]))
    first = min(each * mesh.get_local_rank(along[0]), rows)
    return first, min(first + each, rows)


def at_rest(model: nn.Module) -> dict[Tensor, Tensor]:
    """The sharded parameters of FSDP2, by the whole ones that stand in for them during a step.

    Between forward and backward the root module shows the stand-ins. Optimizers hold the others.
    """
    pairs = {}
    for param in (param for group in fsdp_groups(model) for param in group.fsdp_params):
        if (stand_in := getattr(param, "_unsharded_param", None)) is not None:
            pairs[stand_in] = param.sharded_param
    return pairs


def reshard(model: nn.Module) -> None:
    """Put the parameters of FSDP2 to rest, which a forward without a backward leaves whole."""
    for group in fsdp_groups(model):
        group.reshard()


def shard_ranges(tensors: Sequence[Tensor]) -> tuple[tuple[Range, ...], ...]:
    """Who keeps which part: for each process and tensor a range of the flattened whole.

    The ranges cover every tensor once. Where several processes hold the same, the first keeps it
    and the others have empty ranges.

    >>> shard_ranges([torch.ones(2, 3), torch.ones(4)])
    (((0, 6), (0, 4)),)
    """
    held = all_gather([local_range(tensor) for tensor in tensors])
    seen: set[tuple[int, Range]] = set()
    kept = []
    for ranges in held:
        own = [(i, part) for i, part in enumerate(ranges)]
        kept.append(tuple((0, 0) if place in seen else place[1] for place in own))
        seen.update(own)
    return tuple(kept)


def holders(tensor: Tensor) -> "tuple[ProcessGroup, ...]":
    """The groups of processes over which a tensor is split; none where each holds it whole."""
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            "A gradient should be summed up before its inner products are taken. Found a DTensor "
            f"with placements {tensor.placements}, a term of the sum on each process. "
            "Redistribute it to Shard or Replicate."
        )
    return tuple(tensor.device_mesh.get_group(dim) for dim in _sharded_dims(tensor))


def summed(table: Tensor, over: "tuple[ProcessGroup, ...]") -> Tensor:
    """What the parts add up to, on every process; the table itself where it is about whole tensors.

    >>> summed(torch.ones(2), over=holders(torch.ones(5)))
    tensor([1., 1.])
    """
    if not over:
        return table
    total = table.to(device_of(over[0]), copy=True)
    for group in over:
        dist.all_reduce(total, group=group)
    return total.to(table.device)


def fsdp_groups(model: nn.Module) -> list[Any]:
    """The parameter groups of FSDP2, which reduce together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    groups: list[Any] = []
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            state: Any = module._get_fsdp_state()
            # A list in newer versions of torch, one group or None in older ones.
            several = getattr(state, "_fsdp_param_groups", None)
            groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def _sharded_dims(tensor: "DTensor") -> list[int]:
    """The dimensions of the mesh along which the processes hold different parts."""
    return [dim for dim, place in enumerate(tensor.placements) if not place.is_replicate()]
