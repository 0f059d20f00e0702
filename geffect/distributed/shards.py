"""Shards: which part of a tensor a process holds, and what the parts add up to."""

import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import all_gather, packed, rank, unpacked, world_size
from .zero import note_piece, piece_of, shards_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Range = tuple[int, int]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process may hold no more than a part of the tensor."""
    return _is_dtensor(tensor) or piece_of(tensor) is not None


def is_of_several(tensors: Iterable[Tensor]) -> bool:
    """Whether there are several processes, or a tensor of which one may hold a part.

    >>> is_of_several([torch.ones(2)])
    False
    """
    return world_size() > 1 or any(map(is_sharded, tensors))


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, however it is sharded.

    >>> shape_of(torch.ones(2, 3))
    torch.Size([2, 3])
    """
    piece = piece_of(tensor)
    whole: torch.Size = getattr(tensor, "ds_shape", tensor.shape)  # at stage 3 of ZeRO
    return whole if piece is None else piece.shape


def _is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    # Not imported here: half a second, for programs that have no such tensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not copied: its part, which may be empty, or all of it.

    >>> whole = torch.ones(2)
    >>> local(whole) is whole
    True
    """
    if not _is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, known to be of the same piece as a parameter in an engine; a DTensor says so.

    >>> ones = torch.ones(2)
    >>> laid_out_like(ones, torch.zeros(2)) is ones
    True
    """
    if (piece := piece_of(parameter)) is not None:
        note_piece(tensor, piece)
    return tensor


def local_range(tensor: Tensor) -> Range:
    """Where `local(tensor)` begins and ends in the flattened whole.

    >>> local_range(torch.ones(2, 3))
    (0, 6)
    """
    if (piece := piece_of(tensor)) is not None:
        return piece.begin, piece.end
    if not _is_dtensor(tensor):
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
    if not _is_dtensor(tensor):
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


def expert_ranges(tensor: Tensor, experts: int) -> list[Range]:
    """Where each of so many experts begins and ends in `local(tensor)`, along its first dimension.

    >>> expert_ranges(torch.ones(4, 3), 2)
    [(0, 2), (2, 4)]
    """
    # A piece has one dimension, and may begin within a row.
    piece = piece_of(tensor)
    length = tensor.shape[0] if piece is None else piece.shape.numel()
    first = local_rows(tensor)[0] if piece is None else piece.begin
    return [*pairwise(max(length // experts * e - first, 0) for e in range(experts + 1))]


def at_rest(model: nn.Module) -> dict[Tensor, Tensor]:
    """What optimizers step, by what the model computes with, where these are different tensors.

    FSDP2 shows whole parameters between forward and backward, and its optimizers hold sharded ones.
    In a DeepSpeed engine they are the stand-ins for what a process holds.
    """
    shards = shards_in(model)
    pairs = {} if shards is None else dict(shards.stand_ins)
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
    if (piece := piece_of(tensor)) is not None:
        return (piece.group,)
    if not _is_dtensor(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            "A gradient should be summed up before its inner products are taken. Found a DTensor "
            f"with placements {tensor.placements}, a term of the sum on each process. "
            "Redistribute it to Shard or Replicate."
        )
    return tuple(tensor.device_mesh.get_group(dim) for dim in _sharded_dims(tensor))


def is_first_holder(tensor: Tensor) -> bool:
    """Whether no process before this one holds the same part of the tensor.

    >>> is_first_holder(torch.ones(2))
    True
    """
    if piece_of(tensor) is not None:
        return True
    if not _is_dtensor(tensor):
        return rank() == 0
    mesh = tensor.device_mesh
    return all(
        mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


class PartialSums:
    """Tables whose rows are about tensors that processes hold parts of, as one message.

    `over` has the `holders` of each row. A row about a tensor that each process holds whole is left
    as it is. Copies of a part, as where FSDP2 shards within groups, count as one.

    >>> sums = PartialSums([torch.ones(1, 2)], [[holders(torch.ones(5))]])
    >>> sums.message, sums.filled(sums.message)
    (tensor([], dtype=torch.float64), [tensor([[1., 1.]])])
    """

    def __init__(
        self, tables: Sequence[Tensor], over: "Sequence[Sequence[tuple[ProcessGroup, ...]]]"
    ) -> None:
        self._tables = tables
        self._rows = [[i for i, groups in enumerate(own) if groups] for own in over]
        self._copies = [[_copies(groups) for groups in own if groups] for own in over]

    @property
    def message(self) -> Tensor:
        """`Float64[n]`, to be summed over all processes."""
        return packed(self._parts())

    def filled(self, total: Tensor) -> list[Tensor]:
        """The tables with the sums of the messages in their places."""
        found = [table.clone() for table in self._tables]
        for table, rows, end in zip(found, self._rows, unpacked(total, self._parts()), strict=True):
            table[rows] = end.to(table)
        return found

    def _parts(self) -> list[Tensor]:
        return [
            table[rows] / table.new_tensor(copies).view(-1, *[1] * (table.dim() - 1))
            for table, rows, copies in zip(self._tables, self._rows, self._copies, strict=True)
        ]


def _copies(groups: "tuple[ProcessGroup, ...]") -> int:
    """How many processes hold the same part of a tensor that is split over these groups."""
    return world_size() // prod(dist.get_world_size(group) for group in groups)


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
