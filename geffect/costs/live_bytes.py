"""How many bytes tensors take while something runs, counted and not sampled.

Every storage that an operation of torch makes is counted from then until it is freed, in forward
and backward passes alike, on any device and on none. So the answer is the same in every run; the
peak of a process would hold what the allocator keeps and what other code has touched. What a kernel
needs for itself while it runs is not seen.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geffect.nested import tensors_in


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be inside of the context and are alive.

    - `counts`: whether a tensor counts, asked when it is made.

    >>> with LiveBytes() as live:
    ...     kept = torch.zeros(4) + torch.ones(4)
    >>> live.now, live.peak
    (16, 48)
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._counts = counts
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((*args, *kwargs.values())):
            self._see(tensor, size=0)  # it was there before, or is known
        result = function(*args, **kwargs)
        for tensor in tensors_in(result):
            self._see(tensor, tensor.untyped_storage().nbytes() if self._counts(tensor) else 0)
        self.operated()
        return result

    def counted(self, tensor: Tensor) -> int:
        """The bytes that are counted of a tensor's storage: none of one that was there before."""
        _, size = self._storages.get(key_of(tensor), (None, 0))
        return size

    def operated(self) -> None:
        """Called after each operation."""

    def freed(self, storage: int, size: int) -> None:
        """Called when a storage of so many counted bytes is gone."""
        self.now -= size

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = key_of(tensor)
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.freed(key, size)

        self._storages[key] = weakref.ref(storage, freed), size
        self.now += size
        self.peak = max(self.peak, self.now)


def key_of(tensor: Tensor) -> int:
    """What tells the storage of a tensor from others while it is alive."""
    return int(tensor.untyped_storage()._cdata)
