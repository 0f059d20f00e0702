"""The same step on several processes: DDP, where each holds the model whole, and FSDP2, in parts.

A gradient is averaged over the processes before any inner product is taken, because
`<mean u, mean r>` is not the mean of `<u, r>`. FSDP2 does that in its backward pass and leaves
DTensors. What a process computes of its parts alone adds up over the processes that hold the
others. In a program of one process nothing here does anything.
"""

import pickle
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Range = tuple[int, int]
Value = TypeVar("Value")

BUCKET_BYTES = 25 * 2**20
"""How much is sent at a time: what DDP sends, enough to fill the line, little beside a gradient."""


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if _initialised() else 0


def is_writer() -> bool:
    """Whether this is the process that writes what all of them know."""
    return rank() == 0


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
    mesh, (dim,) = tensor.device_mesh, dims
    rows, row = tensor.shape[0], tensor.numel() // max(tensor.shape[0], 1)
    each = -(-rows // mesh.size(dim))
    first = min(each * mesh.get_local_rank(dim), rows)
    return first * row, min(first + each, rows) * row


def at_rest(model: nn.Module) -> dict[Tensor, Tensor]:
    """The sharded parameters of FSDP2, by the whole ones that stand in for them during a step.

    Between forward and backward the root module shows the stand-ins. Optimizers hold the others.
    """
    pairs = {}
    for param in (param for group in _fsdp_groups(model) for param in group.fsdp_params):
        if (stand_in := getattr(param, "_unsharded_param", None)) is not None:
            pairs[stand_in] = param.sharded_param
    return pairs


def shard_ranges(tensors: Sequence[Tensor]) -> tuple[tuple[Range, ...], ...]:
    """Who keeps which part: for each process and tensor a range of the flattened whole.

    The ranges cover every tensor once. Of processes that hold the same, the first keeps it, and the
    ranges of the others are empty.

    >>> shard_ranges([torch.ones(2, 3), torch.ones(4)])
    (((0, 6), (0, 4)),)
    """
    held = _gathered([local_range(tensor) for tensor in tensors])
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
    total = table.to(_device(over[0]), copy=True)
    for group in over:
        dist.all_reduce(total, group=group)
    return total.to(table.device)


def averages(model: nn.Module) -> bool:
    """Whether the gradients of the model are there for `average`: nothing else reduces them all.

    >>> averages(nn.Linear(2, 1))
    False
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return process_count() > 1 and not all(map(is_sharded, trained))


def average(
    parameters: Sequence[Tensor], vectors: Mapping[str, Sequence[Tensor | None]]
) -> dict[str, list[Tensor | None]]:
    """The mean over the processes of gradients that backward passes left on each, in place.

    For a model whose gradients nothing has reduced, as under `no_sync()` of DDP. Tensors of sharded
    parameters are left as they are: FSDP2 has reduced them. A gradient that is None on some
    processes counts as zero there; one that is None on all stays None. What follows in a vector
    after the parameters' tensors is this process's own, and left alone.

    >>> x = torch.ones(1)
    >>> average([x], {"forget": [x * 3]})
    {'forget': [tensor([3.])]}
    """
    averaged: dict[str, list[Tensor | None]] = {
        name: list(vector) for name, vector in vectors.items()
    }
    own = [i for i, parameter in enumerate(parameters) if not is_sharded(parameter)]
    if process_count() == 1 or not own or not vectors:
        return averaged
    present = torch.tensor([[v[i] is not None for i in own] for v in averaged.values()])
    found = []
    needed = _summed_over_all(present.int()).bool().tolist()
    for vector, places in zip(averaged.values(), needed, strict=True):
        for i in (i for i, somewhere in zip(own, places, strict=True) if somewhere):
            tensor = vector[i]
            if tensor is None:
                vector[i] = tensor = torch.zeros_like(parameters[i], requires_grad=False)
            found.append(tensor)
    with torch.no_grad():
        for bucket in _buckets(found):
            _average(bucket)
    return averaged


def mean(values: Sequence[float]) -> list[float]:
    """The means over the processes, such as those of losses; not finite where one of them is not.

    >>> mean([2.0, 3.0])
    [2.0, 3.0]
    """
    if process_count() == 1:
        return list(values)
    total = _summed_over_all(torch.tensor(values, dtype=torch.float64))
    return (total / process_count()).tolist()


def token_share(tokens: int) -> float:
    """The factor that turns the mean over a process's tokens into one whose average is over all.

    processes · tokens / (tokens of all processes). Where processes have different numbers of
    labelled tokens, the mean of their means is not the mean over tokens. So multiply each loss by
    its share, `nll(model, batch) * token_share(count)`, where the count is of what it is a mean of:
    `int((batch["labels"][:, 1:] != -100).sum())`, as no token is predicted first.

    >>> token_share(17)
    1.0
    """
    everyone = tokens
    if process_count() > 1:
        everyone = int(_summed_over_all(torch.tensor(tokens)))
    if everyone == 0:
        raise ValueError(
            "`tokens` should not be 0 on every process. Found no labelled token in this batch. "
            "Leave the batch out, on all processes."
        )
    return process_count() * tokens / everyone


def anywhere(flag: bool) -> bool:
    """Whether it is so on any process.

    >>> anywhere(False)
    False
    """
    return flag if process_count() == 1 else bool(_summed_over_all(torch.tensor(int(flag))))


def largest(value: float) -> float:
    """The largest number of all processes; infinite where one of them is not a number.

    >>> largest(2.0), largest(float("nan"))
    (2.0, inf)
    """
    peak = torch.tensor(value, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if process_count() > 1:
        peak = peak.to(_device())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def from_first(value: Value) -> Value:
    """What the first process has, on all of them; it has to be something that can be pickled.

    >>> from_first({"next_step": 3})
    {'next_step': 3}
    """
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Together:
    """What a process has to say at the end of a block that all of them run."""

    said = ""

    def alike(self, *values: object) -> None:
        """Demand that every process says the same of these, in words."""
        self.said = repr(values)


@contextmanager
def together() -> Iterator[Together]:
    """What fails inside on one process fails on all of them, so that none is left waiting.

    What they say to be alike is compared. One small reduction, however much is said.

    >>> with together():
    ...     raise FileExistsError("run.h5")
    Traceback (most recent call last):
    FileExistsError: run.h5
    """
    here, failure = Together(), None
    try:
        yield here
    except Exception as error:
        if process_count() == 1:
            raise
        failure = error
    if process_count() == 1:
        return
    # Small enough for the sum of squares: all alike where n * sum of squares = square of the sum.
    word = zlib.crc32(here.said.encode()) % 2**20
    failed, total, squares = _summed_over_all(
        torch.tensor([int(failure is not None), word, word * word])
    ).tolist()
    if failed:
        _raise_together(failure)
    if process_count() * squares != total * total:
        raise ValueError(
            "Losses, weights and options of a step should be the same on every process. Found "
            f"{_gathered(here.said)}. On a process without data of its own, pass 0 * loss."
        )


def _raise_together(failure: Exception | None) -> NoReturn:
    failures = _gathered(None if failure is None else _sendable(failure))
    if failure is not None:
        raise failure
    culprit, other = next((i, error) for i, error in enumerate(failures) if error is not None)
    other.add_note(f"It was raised on process {culprit}; all processes stop with it.")
    raise other


def check_layout(model: nn.Module) -> None:
    """Refuse what spreads a model over processes in a way that leaves no gradient to take."""
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
            if size != process_count():
                raise ValueError(
                    "`DistributedDataParallel` should span all processes. Found a process group of "
                    f"{size} of {process_count()}. Start one program a group."
                )


def check_unsynchronised(model: nn.Module) -> None:
    """Refuse losses whose forward will make DDP reduce: it would do so for one of them only."""
    for module in model.modules():
        # DDP's own mark, set by a forward that a backward pass is to reduce.
        if isinstance(module, DistributedDataParallel) and module.require_forward_param_sync:
            raise RuntimeError(
                "The losses of `recorder.backward` should be computed inside "
                "`with model.no_sync():`. Found a forward of `DistributedDataParallel` outside of "
                "it, after which DDP reduces the gradient of the first loss only. Put the forwards "
                "inside; the gradient of each loss is averaged over the processes here."
            )


@contextmanager
def gradient_sync(model: nn.Module) -> Iterator[None]:
    """Where every backward pass through FSDP2 modules leaves its reduced gradient in `.grad`.

    Also in a micro-batch for which `set_requires_gradient_sync(False)` stands; it stands again
    afterwards. Gradients that are still waiting for reduction are refused: they would be counted to
    the first loss.
    """
    groups = _fsdp_groups(model)
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


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sharded_dims(tensor: "DTensor") -> list[int]:
    """The dimensions of the mesh along which the processes hold different parts."""
    return [dim for dim, place in enumerate(tensor.placements) if not place.is_replicate()]


def _device(group: "ProcessGroup | None" = None) -> torch.device:
    """Where a group exchanges numbers: on the CPU if it can, which no kernel has to wait for."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _summed_over_all(table: Tensor) -> Tensor:
    table = table.to(_device())
    dist.all_reduce(table)
    return table


def _gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    values = [value] * process_count()
    if process_count() > 1:
        dist.all_gather_object(values, value)
    return values


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
        dist.all_reduce(bucket[0].mul_(1 / process_count()))
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).mul_(1 / process_count())
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _sendable(error: Exception) -> Exception:
    """The error, or what can be said of one that cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _fsdp_groups(model: nn.Module) -> list[Any]:
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


def _waits(param: Any) -> bool:
    """Whether a parameter of FSDP2 has a gradient that is not reduced yet."""
    unsharded = getattr(param, "_unsharded_param", None)
    held = None if unsharded is None else unsharded.grad
    return held is not None or param.unsharded_accumulated_grad is not None
