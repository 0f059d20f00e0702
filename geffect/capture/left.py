"""What a micro-batch has left in `.grad`, and whether that is still there for the next one."""

from collections.abc import Callable, Iterable, Sequence
from weakref import ref

import torch
from torch import Tensor

from geffect import distributed, dots
from geffect.gradients import Vector, is_empty


class Left:
    """The `.grad` of parameters as they are now: where each lies, and how often it was written.

    Both are told without a look at values. What writes through `.data` is not noticed.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> left = Left([weight])
    >>> _ = weight.grad.mul_(0.5)
    >>> left.changed(lambda: [torch.ones(2)])
    [0]
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._marks = [_mark(parameter.grad) for parameter in parameters]

    @property
    def is_cleared(self) -> bool:
        """Whether all that was there is None or zero since."""
        pairs = zip(self._parameters, self._marks, strict=True)
        there = [(parameter.grad, mark) for parameter, mark in pairs if mark is not None]
        return bool(there) and all(grad is None or _is_zeroed(grad, mark) for grad, mark in there)

    def changed(self, sums: Callable[[], Vector], *, scale: float = 1.0) -> list[int]:
        """The places of those that are no more the sums, times `scale`.

        The sums are asked for, and values looked at, where one was written.
        """
        grads = [parameter.grad for parameter in self._parameters]
        pairs = enumerate(zip(grads, self._marks, strict=True))
        written = [place for place, (grad, mark) in pairs if _mark(grad) != mark]
        due = sums() if written else []
        return [place for place in written if not _is_sum(grads[place], due[place], scale)]


class Leftover:
    """What lay in `.grad` before a gradient was added to it: a step would be by the sum of both.

    `note` says that the gradient was added. From then on a tensor counts until its `.grad` is
    another one, as `zero_grad(set_to_none=True)` makes it.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> leftover = Leftover([weight])
    >>> weight.sum().backward()
    >>> leftover.note()
    >>> leftover.is_in([weight])
    True
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        there = [] if is_empty(parameters) else parameters
        self._parameters = [parameter for parameter in there if not is_empty([parameter])]
        self._grads: dict[int, ref[Tensor]] = {}

    def note(self) -> None:
        """The gradient was added."""
        self._grads = {id(p): ref(p.grad) for p in self._parameters if p.grad is not None}

    def is_in(self, tensors: Iterable[Tensor]) -> bool:
        """Whether it lies in the `.grad` of any of these."""
        known = [(tensor.grad, self._grads.get(id(tensor))) for tensor in tensors]
        return any(grad is not None and g is not None and g() is grad for grad, g in known)


def _mark(grad: Tensor | None) -> tuple[int, int] | None:
    if grad is None:
        return None
    local = distributed.local(grad)
    return 0 if dots.is_sparse(local) else local.data_ptr(), grad._version


def _is_zeroed(grad: Tensor, mark: tuple[int, int]) -> bool:
    return grad._version != mark[1] and not distributed.local(grad).any()


def _is_sum(grad: Tensor | None, total: Tensor | None, scale: float) -> bool:
    """Whether it is the sum but for rounding, as where a clip that was not needed wrote it."""
    if grad is None or total is None:
        return grad is total
    held, due = (dots.dense(distributed.local(tensor)) for tensor in (grad, total))
    due = due * scale
    rounding = 16 * torch.finfo(held.dtype).eps
    return not due.numel() or bool((held - due).abs().max() <= rounding * due.abs().max())
