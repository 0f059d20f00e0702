"""Devices: which there are, and how tensors are walked over where they lie."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def there(device: str | torch.device | None) -> torch.device:
    """The device; where none is said cuda, if it is there, else the CPU.

    >>> there("cpu")
    device(type='cpu')
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    # The second is from a torch without CUDA, the third from a name that is none.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise _no_device(device) from error
    if found.type == "meta":
        raise _no_device(device)
    return found


def has_kernels(*tensors: Tensor) -> bool:
    """Whether `geffect.kernels` are for these: on one GPU, where Triton is installed.

    Whatever asks takes torch's operations where the answer is no.

    >>> has_kernels(torch.ones(2))
    False
    """
    device = tensors[0].device
    return (
        device.type == "cuda"
        and all(tensor.device == device and tensor.dtype in KINDS for tensor in tensors)
        and _runs_triton(device)
    )


def at_a_time(tensor: Tensor, *, cached: int) -> int:
    """How many coordinates to look at together: `cached` on a CPU, whose cache holds so many.

    Elsewhere a launch takes as long as many coordinates do, and they only have to fit the memory.

    >>> at_a_time(torch.ones(2), cached=65536)
    65536
    """
    return cached if tensor.device.type == "cpu" else LARGE


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor of the CPU on a device, which is not waited for: it is read from pinned memory.

    >>> sent(torch.ones(2), torch.device("cpu"))
    tensor([1., 1.])
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left.

    >>> out_of_memory(torch.OutOfMemoryError()), out_of_memory(RuntimeError("of another kind"))
    (True, False)
    """
    # On a CPU torch raises a RuntimeError, which names its allocator.
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


@torch.no_grad()
def swap(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Exchange values tensor by tensor: no second copy of a model at any time.

    >>> one, other = torch.ones(2), torch.zeros(2)
    >>> swap([one], [other])
    >>> one, other
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    for one, other in zip(some, others, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def fetched(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; a GPU is not waited for, and fills it until `arrival` has been.

    It fills pinned memory, which torch keeps, once it is let go of, for the next one.

    >>> fetched(torch.ones(2))
    tensor([1., 1.])
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return room.copy_(tensor, non_blocking=True)


def arrival(places: Iterable[torch.device]) -> Callable[[], None]:
    """What waits until all that has been `fetched` from these devices so far is there.

    >>> arrival([torch.device("cpu")])()
    """
    events = [
        torch.cuda.current_stream(place).record_event() for place in places if place.type == "cuda"
    ]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


LARGE = 2**24


@cache
def _runs_triton(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _no_device(device: object) -> ValueError:
    return ValueError(
        f"`device` should be one of this machine, such as cpu or cuda:0. Found `{device}`, which "
        "torch does not have here. Choose another, or leave it out."
    )
