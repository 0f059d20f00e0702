"""How much memory tensors take at most while something runs, counted and not sampled.

Every storage that an operation of torch makes is counted from then until it is freed, in forward
and backward passes alike, on any device. So the answer is the same in every run; the peak of a
process would hold what the allocator keeps and what other code has touched. What a kernel needs for
itself while it runs is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .rounds import Load
from .workload import Workload


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be inside of the context and are alive.

    With `counts`, only of those that it accepts when they are made.
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._counts = counts
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            self._see(tensor, size=0)  # it was there before, or is known
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, tensor.untyped_storage().nbytes() if self._counts(tensor) else 0)
        return result

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(load: Load) -> int:
    """The most that tensors take while a load runs, beside those that were there before."""
    with LiveBytes() as live:
        load()
    return live.peak


def peak_gradients(workload: Workload, load: Load) -> int:
    """The same of gradients alone: of what has as many numbers as a matrix of the model.

    For a workload whose activations all have another number of them.
    """
    with live_gradients(workload) as live:
        load()
    return live.peak


def live_gradients(workload: Workload) -> LiveBytes:
    """Counts what has as many numbers as a matrix of the model, and nothing else."""
    sizes = {matrix.numel() for matrix in _matrices(workload)}
    return LiveBytes(lambda tensor: tensor.numel() in sizes)


def gradient_bytes(workload: Workload) -> int:
    """One whole gradient, by the same measure."""
    return sum(matrix.numel() * matrix.element_size() for matrix in _matrices(workload))


def _matrices(workload: Workload) -> list[Tensor]:
    return [parameter for parameter in workload.parameters if parameter.dim() > 1]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among what an operator takes or gives, which is at most a list of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
