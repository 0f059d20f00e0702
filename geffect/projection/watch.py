"""Which optimizers step the gradient that a rectifier has left."""

from collections.abc import Collection, Iterable
from weakref import finalize, ref

import torch
from torch import Tensor

from geffect.hooks import AFTER_STEPS, BEFORE_STEPS, Hooks, weakly
from geffect.optimizers import at_rest_in, check_descends, moved_by, tensors_of

from .options import SpaceName


class StepWatch:
    """Refuses steps that break the promise of a rectified gradient, whoever takes them.

    It looks at the steps of all optimizers for as long as it lives, and minds those that step a
    gradient it was told of by `expect`, for as long as that lies where it was left.

    - Where no optimizer is attached, each should go down, and together they should step all.
    - An attached one should be the only one to step. What it does not hold took no part.
    - In update space its step is what is rectified, once: it should be the one that comes, and no
      second one should follow.
    """

    def __init__(self) -> None:
        self._attached: torch.optim.Optimizer | None = None
        self._in_update = False
        self._left: dict[int, _Left] = {}  # the gradients that were left, by their tensors
        self._waiting: set[int] = set()  # of these, what no optimizer has stepped yet
        self._is_inside = self._is_over = False  # whether the attached one steps, and has stepped
        self._others: set[int] = set()  # optimizers that step what the attached one should
        self._looks, self._hooks = False, Hooks()
        finalize(self, self._hooks.remove)

    def begin(self) -> None:
        """Look at steps from now on."""
        if self._looks:
            return
        self._hooks.add(BEFORE_STEPS.register, weakly(self._before))
        self._hooks.add(AFTER_STEPS.register, weakly(self._after))
        self._looks = True

    def expect(
        self,
        parameters: Iterable[Tensor],
        attached: torch.optim.Optimizer | None,
        space: SpaceName,
    ) -> int:
        """Begin to mind a new gradient; how many parts of the last one no optimizer stepped.

        0 where none was stepped at all, as between micro-batches, or where one was attached.
        """
        left = len(self._waiting)
        alone = left if self._attached is None and left < len(self._left) else 0
        self._attached, self._in_update = attached, space == "update"
        self._left = {id(p): _Left(p.grad) for p in parameters if p.grad is not None}
        self._waiting = set(self._left)
        self._is_inside = self._is_over = False
        self._others.clear()
        return alone

    def end(self) -> None:
        """Look at no more steps until it is begun anew."""
        self._left, self._waiting = {}, set()
        self._hooks.remove()
        self._looks = False

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        found = [tensor for tensor in moved_by(optimizer) if self._is_left(tensor)]
        if not found:
            return
        check_descends(optimizer)
        if self._attached is None:
            self._waiting -= {id(t) for t in found} - {id(t) for t in at_rest_in(optimizer)}
            return
        held = set(map(id, tensors_of(self._attached)))
        self._check_held(optimizer, [tensor for tensor in found if id(tensor) not in held])
        if optimizer is not self._attached:
            if not self._is_inside:
                self._others.add(id(optimizer))
            return
        if self._is_over and self._in_update:
            raise ValueError(
                "A rectified step should be taken once for each gradient: a second step by the "
                f"same gradient would not be rectified. Found another `step()` of "
                f"{type(optimizer).__name__}. Call `rectifier.backward` before each step, or "
                'rectify the gradient itself by space="gradient".'
            )
        self._is_inside = True

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._attached is None:
            self._note_versions(map(id, tensors_of(optimizer)))
        elif optimizer is self._attached:
            self._is_inside, self._is_over = False, True
            self._note_versions(self._left)
        elif id(optimizer) in self._others:
            self._others.discard(id(optimizer))
            # One that stands around the attached one has let it step meanwhile.
            if self._in_update and not self._is_over:
                self._left.clear()
                raise _stepped_by(optimizer, self._attached)

    def _is_left(self, tensor: Tensor) -> bool:
        left = self._left.get(id(tensor))
        return left is not None and left.is_in(tensor)

    def _note_versions(self, tensors: Iterable[int]) -> None:
        for tensor in tensors:
            if (left := self._left.get(tensor)) is not None:
                left.note_version()

    def _check_held(self, optimizer: torch.optim.Optimizer, foreign: Collection[Tensor]) -> None:
        if foreign:
            raise ValueError(
                "The optimizer of a rectifier should step all that is trained with its gradient: "
                "what another one steps takes no part in the constraint. Found "
                f"{type(optimizer).__name__} about to step {len(foreign)} parameters that the "
                f"{type(self._attached).__name__} of the rectifier does not hold. Give all to one "
                'optimizer; or take Rectifier(model, space="gradient") without an optimizer.'
            )


class _Left:
    """A gradient that was left in `.grad`. It may be clipped; once it is cleared it is another."""

    def __init__(self, grad: Tensor) -> None:
        self._grad = ref(grad)
        self._version: int | None = None  # when the step was taken, behind which nothing clips

    def is_in(self, tensor: Tensor) -> bool:
        """Whether it still is the gradient of the tensor."""
        grad = self._grad()
        if grad is None or grad is not tensor.grad:
            return False
        return self._version is None or self._version == grad._version

    def note_version(self) -> None:
        """The step was taken: what writes from now on makes another gradient of it."""
        grad = self._grad()
        self._version = None if grad is None else grad._version


def _stepped_by(other: object, attached: object) -> ValueError:
    return ValueError(
        "In update space the optimizer of the rectifier should take the step, which is rectified "
        f"there. Found that {type(other).__name__} has stepped its parameters, and that "
        f"{type(attached).__name__} has not: the step was not rectified. Call "
        "rectifier.attach(optimizer) with the one that steps, also where it was made anew."
    )
