"""An optimizer's step that is taken here, a few tensors at a time or all of them, and changed."""

import copy
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks

from geffect import distributed
from geffect.interrupts import put_back_after, to_the_end
from geffect.optimizers import tensors_of

from .graphless import without_graph

PORTION_BYTES = 2**24
"""How much of the parameters is stepped at a time, where that can be chosen."""

Grads = Sequence[tuple[Tensor, Tensor | None]]


class Portion(Protocol):
    """Some tensors, as they were before the optimizer's step."""

    def finish(self) -> None:
        """Change what the step has made of them; called anew after an interrupt."""

    def undo(self) -> None:
        """Take back what the step has made of them."""


Begin = Callable[[Sequence[Tensor]], Portion]
"""Called with some tensors before they are stepped, when no others have a gradient."""


def steps_tensor_by_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is one of each tensor by itself, as that of all optimizers of torch."""
    return type(optimizer).__module__.startswith("torch.optim.")


class StepInPortions:
    """The step of an optimizer of torch, bit for bit, with something done around each portion.

    `take` is to be called before the step itself, which then finds no gradient and moves nothing:
    hooks and schedulers see that one step. `put_back` gives the gradients back. An interrupt is
    raised when all portions are stepped and finished; one that comes inside of the code of the
    optimizer may leave a portion half stepped, and an error there leaves the next ones as they
    were. Where a portion cannot be finished, its tensors are as before the step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, begin: Begin, *, portion_bytes: float
    ) -> None:
        self.over = False  # whether all of it has been taken
        own = tensors_of(optimizer)
        self._grads = [(tensor, tensor.grad) for tensor in own if tensor.grad is not None]
        self._twin = _twin(optimizer)
        self._portions = [_Portion(g, begin) for g in _divided(self._grads, portion_bytes)]

    def take(self) -> None:
        """Take the step."""
        try:
            for tensor, _ in self._grads:
                tensor.grad = None
            to_the_end(self._take)
        except BaseException:
            to_the_end(self.put_back)
            raise

    def put_back(self) -> None:
        """Give the gradients back."""
        for tensor, grad in self._grads:
            tensor.grad = grad

    def _take(self) -> None:
        for portion in self._portions:
            portion.take(self._twin)
            if isinstance(portion.torn, Exception):
                return
        self.over = True


class _Portion:
    """A portion, as far as its step has come."""

    def __init__(self, grads: Grads, begin: Begin) -> None:
        self.torn: BaseException | None = None  # what came from inside of the optimizer
        self._grads, self._begin = grads, begin
        self._begun: tuple[Portion, list[int]] | None = None
        self._done = self._failed = False
        self._stepped: list[object] = []  # what the step has answered, once it was made

    def take(self, twin: torch.optim.Optimizer) -> None:
        """Step, and finish; called anew, what is missing of it."""
        if self._done:
            return
        tensors = [tensor for tensor, _ in self._grads]
        for tensor, grad in self._grads:
            tensor.grad = grad
        if self._begun is None:
            self._begun = self._begin(tensors), [tensor._version for tensor in tensors]
        kept, versions = self._begun
        if (
            not self._stepped
            and self.torn is None
            and versions == [tensor._version for tensor in tensors]
        ):
            self._step(twin)
        self._finish(kept)
        for tensor in tensors:
            tensor.grad = None
        self._done = True
        self._begun = None  # what was kept of the tensors goes before the next ones are begun

    def _step(self, twin: torch.optim.Optimizer) -> None:
        try:
            _step_without_hooks_of_all(twin, self._stepped)
        except BaseException as error:
            if _is_of_torch(error):
                self.torn = error
            raise

    def _finish(self, kept: Portion) -> None:
        try:
            without_graph(kept.finish)
        except Exception:
            if self._failed:
                without_graph(lambda: to_the_end(kept.undo))
            self._failed = True
            raise


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer without what others have hung on its step: hooks, and wrappers of `step`.

    State, groups and all else are shared. A copy of an optimizer has no hooks.
    """
    twin = copy.copy(optimizer)
    own = vars(twin).keys() | {"step"}
    vars(twin).update((name, value) for name, value in vars(optimizer).items() if name not in own)
    return twin


def _step_without_hooks_of_all(optimizer: torch.optim.Optimizer, done: list[object]) -> None:
    """A step without the hooks for the steps of all optimizers: torch has no switch for them."""
    kept: list[tuple[MutableMapping[int, Any], dict[int, Any]]] = [
        (hooks, dict(hooks)) for hooks in (pre_hooks, post_hooks)
    ]

    def step() -> None:
        for hooks, _ in kept:
            hooks.clear()
        done.append(optimizer.step())  # fused optimizers leave the versions of tensors as they are

    def put_back() -> None:
        for hooks, known in kept:
            hooks.update(known)

    put_back_after(step, put_back)


def _is_of_torch(error: BaseException) -> bool:
    """Whether the code of torch was running when it came."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("torch.optim"):
            return True
        trace = trace.tb_next
    return False


def _divided(grads: Grads, portion_bytes: float) -> Iterable[Grads]:
    portion: list[tuple[Tensor, Tensor | None]] = []
    size = 0
    for tensor, grad in grads:
        own = distributed.local(tensor.detach()).nbytes
        if portion and size + own > portion_bytes:
            yield portion
            portion, size = [], 0
        portion.append((tensor, grad))
        size += own
    if portion:
        yield portion
