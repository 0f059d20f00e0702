"""Reduction: how the gradients of several processes become one, under DDP and FSDP2."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from geffect.text import plain

from .processes import all_reduce, world_size
from .shards import at_rest, fsdp_groups, is_sharded, local
from .zero import shards_in

Vector = Sequence[Tensor | None]

BUCKET_BYTES = 25 * 2**20
"""How much is sent at a time: what DDP sends, enough to fill the line, little beside a gradient."""


def averages(model: nn.Module) -> bool:
    """Whether the gradients of the model are there for `average`: nothing else reduces them all.

    >>> averages(nn.Linear(2, 1))
    False
    """
    rest = at_rest(model)
    trained = [rest.get(p, p) for p in model.parameters() if p.requires_grad]
    return world_size() > 1 and not all(map(is_sharded, trained))


def presence(parameters: Sequence[Tensor], vectors: Mapping[str, Vector]) -> Tensor:
    """Which of the gradients that `average` takes are here, `Float64[vector, parameter]`.

    >>> presence([torch.ones(1)], {"forget": [None], "retain": [torch.ones(1)]})
    tensor([[0.],
            [1.]], dtype=torch.float64)
    """
    own = _unsharded(parameters)
    flags = [[v[i] is not None for i in own] for v in vectors.values()]
    return torch.tensor(flags, dtype=torch.float64)


def average(
    parameters: Sequence[Tensor],
    vectors: Mapping[str, Vector],
    present: Tensor | None = None,
) -> dict[str, list[Tensor | None]]:
    """The mean over the processes of gradients that backward passes left on each, in place.

    For a model whose gradients nothing has reduced, as under `no_sync()` of DDP. Tensors of sharded
    parameters are left as they are: FSDP2 has reduced them. A gradient that is None on some
    processes counts as zero there; one that is None on all stays None: `present` is the sum of
    `presence` over the processes, where that is known. What follows in a vector after the
    parameters' tensors is this process's own, and left alone.

    >>> x = torch.ones(1)
    >>> average([x], {"forget": [x * 3]})
    {'forget': [tensor([3.])]}
    """
    averaged: dict[str, list[Tensor | None]] = {
        name: list(vector) for name, vector in vectors.items()
    }
    own = _unsharded(parameters)
    if world_size() == 1 or not own or not vectors:
        return averaged
    if present is None:
        present = all_reduce(presence(parameters, vectors))
    found = []
    for vector, places in zip(averaged.values(), present.bool().tolist(), strict=True):
        for i in (i for i, somewhere in zip(own, places, strict=True) if somewhere):
            tensor = vector[i]
            if tensor is None:
                vector[i] = tensor = torch.zeros_like(parameters[i], requires_grad=False)
            found.append(tensor)
    with torch.no_grad():
        for bucket in _buckets(found):
            _average(bucket)
    return averaged


def _unsharded(parameters: Sequence[Tensor]) -> list[int]:
    return [i for i, parameter in enumerate(parameters) if not is_sharded(parameter)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in portions of one type each, in an order that is the same everywhere."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield list(bucket)
            bucket.clear()
        bucket.append(tensor)
    yield from open_buckets.values()


def _average(bucket: Sequence[Tensor]) -> None:
    # Divided before it is summed, as DDP does it: then training goes on bit for bit as under DDP.
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0].mul_(1 / world_size()))
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).mul_(1 / world_size())
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def check_layout(model: nn.Module) -> None:
    """Refuse parameters of which some have no gradient of their own, by their place or process."""
    _check_storage(model)
    shards_in(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                "`model` should be sharded by `fully_shard` (FSDP2). Found "
                "`FullyShardedDataParallel`, which flattens parameters beyond recognition. "
                "Call fully_shard on the layers and on the model instead of wrapping it."
            )
        if isinstance(module, DistributedDataParallel):
            size = dist.get_world_size(module.process_group)
            if size != world_size():
                raise ValueError(
                    "`DistributedDataParallel` should span all processes. Found a process group of "
                    f"{size} of {world_size()}. Start one program a group."
                )


def _check_storage(model: nn.Module) -> None:
    """Refuse two parameters in one place: a step by the gradient of one moves the other too."""
    places: dict[object, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or is_lazy(parameter):
            continue
        own = local(parameter.detach())
        if own.layout is not torch.strided or own.is_meta:
            continue
        place = own.device, own.data_ptr() or name  # an empty one is nowhere
        other = places.setdefault(place, name)
        if other != name:
            raise ValueError(
                "Each parameter of a model should have memory of its own. Found that of "
                f"`{plain(other)}` and `{plain(name)}` to be one, so that a step by the gradient "
                "of either moves both. Tie the parameter itself, such as `head.weight = "
                "embedding.weight`, not its data."
            )


def check_unsynchronised(model: nn.Module) -> None:
    """Refuse losses whose forward will make DDP reduce: it would do so for one of them only."""
    for module in model.modules():
        # DDP's own mark, set by a forward that a backward pass is to reduce.
        if isinstance(module, DistributedDataParallel) and module.require_forward_param_sync:
            raise RuntimeError(
                "Losses whose gradients are taken apart should be computed inside "
                "`with model.no_sync():`. Found a forward of `DistributedDataParallel` outside of "
                "it, after which DDP reduces the gradient of the first loss only. Put the forwards "
                "inside; the gradient of each loss is averaged over the processes here."
            )


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Where forwards are made for DDP not to reduce: each gradient is averaged here by itself."""
    with ExitStack() as until_left:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                until_left.enter_context(module.no_sync())
        yield


@contextmanager
def gradient_sync(model: nn.Module) -> Iterator[None]:
    """Where every backward pass through FSDP2 modules leaves its reduced gradient in `.grad`.

    This holds in a micro-batch for which `set_requires_gradient_sync(False)` is set, too; that is
    restored afterwards. Raises an error for gradients that still wait for reduction: they would
    count as those of the first loss.
    """
    groups = fsdp_groups(model)
    waiting = [param for group in groups for param in group.fsdp_params if _waits(param)]
    if waiting:
        raise RuntimeError(
            "Every gradient of a step should be reduced before one of its losses is differentiated "
            f"alone. Found {len(waiting)} parameters with sums of an earlier backward pass, which "
            "ran after set_requires_gradient_sync(False). Pass the losses of each micro-batch to "
            "the recorder, or call model.set_requires_gradient_sync(True) for all of them."
        )
    before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = True
    try:
        yield
    finally:
        for group, (reduce_grads, all_reduce_grads) in zip(groups, before, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads


def _waits(param: Any) -> bool:
    """Whether a parameter of FSDP2 has a gradient that is not reduced yet."""
    unsharded = getattr(param, "_unsharded_param", None)
    held = None if unsharded is None else unsharded.grad
    return held is not None or param.unsharded_accumulated_grad is not None
