"""A device that is not there: tensors of the CPU that say they lie elsewhere, and are counted.

A `FarTensor` holds a tensor of the CPU and says that it lies on another device. What is done to it
is done to what it holds, so values are right; and since torch sends every operation through here,
launches, and what waits for the device, can be counted. As on a GPU, a tensor of the CPU that is
no single number cannot be mixed in.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

FAR = torch.device("meta")  # no tensors of this device are used otherwise

Kwargs = Mapping[str, Any]

# What makes a tensor, or looks at one in another way, launches nothing.
QUIET = re.compile(
    r"(empty|empty_like|empty_strided|new_empty|new_empty_strided|detach|alias|view|_unsafe_view"
    r"|_reshape_alias|as_strided|t|transpose|permute|expand|select|slice|unsqueeze|squeeze|unbind"
    r"|split|split_with_sizes|diagonal|lift_fresh|view_as_real)"
)
# What looks at values from the host beside `_local_scalar_dense` and copies.
WAITS = re.compile(r"(_local_scalar_dense|equal|nonzero|masked_select|is_nonzero|unique|_unique2)")

# What does not look at the tensor that it changes.
UNREAD = ("copy_", "zero_", "fill_", "random_")


class FarTensor(Tensor):
    """A tensor of the CPU that says it lies on the device that is not there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Self:
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=FAR,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.held!r})"

    def tolist(self) -> Any:
        """As a tensor of another device does it: by a copy on the CPU."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return done(func, args, kwargs or {})


def done(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation, done to what the tensors hold."""
    given = [x for x in _flat([args, kwargs]) if isinstance(x, Tensor)]
    far = [x for x in given if isinstance(x, FarTensor)]
    name = func.overloadpacket.__name__
    near = [x for x in given if not isinstance(x, FarTensor) and x.dim() > 0]
    mixes = name in ("copy_", "index", "index_put_", "_index_put_impl_", "_to_copy")
    if far and near and not mixes:
        raise RuntimeError(f"Tensors should be on one device. Found one of the CPU in `{name}`.")
    device = kwargs.get("device")
    stays_far = bool(far) if device is None else torch.device(device) == FAR
    if name == "copy_" and not isinstance(args[0], FarTensor):
        stays_far = False
    unwrapped = [tree_map(_held, x) for x in (args, kwargs)]
    if device is not None:
        unwrapped[1]["device"] = torch.device("cpu")
    if name == "_to_copy" and device is not None and far and not stays_far:
        unwrapped[0] = (unwrapped[0][0].clone(), *unwrapped[0][1:])
    found = func(*unwrapped[0], **unwrapped[1])
    changed = {id(x.held): x for x in far}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, FarTensor):
            return x
        if id(x) in changed:
            return changed[id(x)]
        return FarTensor(x) if stays_far else x

    return tree_map(wrapped, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, FarTensor) else x


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, list | tuple):
        for y in x:
            yield from _flat(y)
    elif isinstance(x, dict):
        yield from _flat(list(x.values()))
    else:
        yield x


@dataclass
class Counted(TorchDispatchMode):
    """Counts what is launched on the far device, and how often it is waited for."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)  # bytes, each tensor once a launch
    written: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_flat([args, kwargs]))
        is_far = any(isinstance(x, FarTensor) for x in given)
        device = kwargs.get("device")
        if not is_far and (device is None or torch.device(device) != FAR):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        to_host = device is not None and torch.device(device) != FAR
        to_host = to_host or (name == "copy_" and not isinstance(args[0], FarTensor))
        if to_host or WAITS.fullmatch(name):
            self.waits[name] += 1
        elif not QUIET.fullmatch(name):
            self.launches[name] += 1
            found = done(func, args, kwargs)
            inputs = given[1:] if name in UNREAD else given
            self.move(name, inputs, list(_flat(found)))
            return found
        return done(func, args, kwargs)

    def move(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count what a launch reads and writes."""
        for counter, tensors in ((self.read, inputs), (self.written, outputs)):
            far = {x.held.data_ptr(): x.held.nbytes for x in tensors if isinstance(x, FarTensor)}
            counter[name] += sum(far.values())


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """A block in which far tensors have kernels, and what happens to them is counted."""
    from geffect import devices
    from geffect.kernels import launching

    counted = Counted()

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
        counted.launches[kernel.__name__] += 1
        *inputs, output = [x for x in arguments if isinstance(x, FarTensor)]
        if not constants.get("PLACES"):  # of a sample
            counted.move(kernel.__name__, inputs, [output])
        held = [_held(argument) for argument in arguments]
        with _disable_current_modes():
            kernel[programs,](*held, **constants)

    with monkeypatch.context() as patched, counted:
        patched.setattr(devices, "has_kernels", _has_kernels)
        patched.setattr(launching, "_launch", launch)
        yield counted


@contextmanager
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block in which tensors of the CPU have kernels, run by Triton's interpreter."""
    from geffect import devices

    with monkeypatch.context() as patched:
        patched.setattr(devices, "has_kernels", _has_kernels)
        yield


def _has_kernels(*tensors: Tensor) -> bool:
    from geffect import devices

    return all(tensor.dtype in devices.KINDS for tensor in tensors)


def moved_far(model: nn.Module) -> nn.Module:
    """The model with its parameters on the device that is not there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(FarTensor(parameter.detach())))
    return model


class Spread(nn.Module):
    """A model of so many tensors side by side, so that all of them get a gradient of one size."""

    def __init__(self, tensors: int, side: int = 4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(side, side, generator=draw)) for _ in range(tensors)
        )

    def forward(self, x: Tensor) -> Tensor:
        """What each of them makes of x, in the mean."""
        return torch.stack([torch.tanh(x @ weight) for weight in self.weights]).mean(dim=0)

    def losses(self, step: int = 0) -> dict[str, Tensor]:
        """Losses of a forget and a retain side, which are in conflict."""
        draw = torch.Generator().manual_seed(step + 1)
        first = self.weights[0]
        sides = []
        for _ in range(2):
            x = torch.randn(3, len(first), generator=draw).to(first.dtype)
            sides.append(self(FarTensor(x) if isinstance(first.detach(), FarTensor) else x))
        forget, retain = (side.float() for side in sides)
        return {"forget": (forget - 1).square().mean(), "retain": (retain - 1).square().mean()}
