"""Which optimizers step the gradient that a rectifier has left, and whether they may."""

from collections.abc import Sequence
from weakref import finalize, ref

import torch
from torch import Tensor

from geffect.hooks import AFTER_STEPS, BEFORE_STEPS, Hooks, weakly
from geffect.optimizers import at_rest_in, check_descends, moved_by, tensors_of

from .notices import Notices


class StepWatch:
    """Looks at the steps of all optimizers for a rectifier, from `begin` to `end`.

    Steps that break what it promises of a gradient are refused; what can be told only afterwards is
    warned of.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._promise: Promise | None = None  # what is promised of the gradient that was left
        self._looks, self._hooks = False, Hooks()
        finalize(self, self._hooks.remove)

    def __reduce__(self) -> tuple[type["StepWatch"], tuple[Notices]]:
        """A copy looks at no steps until it is begun."""
        return StepWatch, (self._notices,)

    def begin(self) -> None:
        """Look at steps from now on."""
        if not self._looks:
            self._hooks.add(BEFORE_STEPS.register, weakly(self._before), first=True)
            self._hooks.add(AFTER_STEPS.register, weakly(self._after))
            self._looks = True

    def expect(
        self,
        parameters: Sequence[Tensor],
        attached: torch.optim.Optimizer | None,
        changes_step: bool,
    ) -> None:
        """A new gradient was left; the one before is told of where it was not stepped as it should.

        - `attached`: the optimizer that steps it; None where that is not known.
        - `changes_step`: whether the step of the attached one will be changed.
        """
        before = self._promise
        left = [parameter for parameter in parameters if parameter.grad is not None]
        self._promise = OfGradient(left) if attached is None else OfStep(left, attached)
        self._promise.changes_step = changes_step
        if before is not None:
            before.look_back(self._notices)

    def enter(self) -> None:
        """The step of the attached optimizer begins."""
        if self._promise is not None:
            self._promise.enter()

    def leave(self) -> None:
        """The step of the attached optimizer has ended."""
        if self._promise is not None:
            self._promise.leave()

    def check_between_steps(self) -> None:
        """Refuse another optimizer where the step of the one before is still to be changed."""
        if self._promise is not None:
            self._promise.check_over()

    def end(self) -> None:
        """Look at no more steps until it is begun anew."""
        self._promise = None
        self._hooks.remove()
        self._looks = False

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._promise is not None:
            self._promise.before(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._promise is not None:
            self._promise.after(optimizer)


class Promise:
    """What has to come of one gradient; here nothing has."""

    changes_step = False  # whether the step of the attached optimizer will be changed

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Any optimizer is about to step."""

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Any optimizer has stepped."""

    def enter(self) -> None:
        """The attached optimizer is about to step, inside of which others may."""

    def leave(self) -> None:
        """The attached optimizer has stepped."""

    def check_over(self) -> None:
        """Refuse to go on with another optimizer before the promise is kept."""

    def look_back(self, notices: Notices) -> None:
        """The next gradient is there: warn of what was not as it should be."""


class OfGradient(Promise):
    """A gradient that is rectified itself: each optimizer goes down, and together they step all."""

    def __init__(self, left: Sequence[Tensor]) -> None:
        self._count = len(left)
        self._waiting = set(map(id, left))  # what no optimizer has stepped yet

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._waiting.isdisjoint(map(id, tensors_of(optimizer))):
            check_descends(optimizer)
            self._waiting.difference_update(map(id, moved_by(optimizer)))

    def look_back(self, notices: Notices) -> None:
        # None was stepped at all where no step was taken, as between micro-batches.
        if len(self._waiting) < self._count:
            notices.alone(len(self._waiting))


class OfStep(Promise):
    """A gradient for one optimizer, which alone steps it.

    Where its step is changed it takes one: what another one moves by the gradient, or a second
    step, would not be rectified. Before it has come, any gradient that lies there counts; later the
    same one, as others may be the user's own.
    """

    def __init__(self, left: Sequence[Tensor], attached: torch.optim.Optimizer) -> None:
        self._attached = attached
        self._held = set(map(id, tensors_of(attached)))
        self._resting = set(map(id, at_rest_in(attached)))
        self._left = {id(tensor): _Known(tensor) for tensor in left}
        self._is_inside = self._is_over = False
        self._others: set[int] = set()  # optimizers that are about to step what it should

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is self._attached:
            return
        found = self._stepped_by(optimizer)
        foreign = [tensor for tensor in found if id(tensor) not in self._held]
        if foreign:
            raise ValueError(
                "The optimizer of a rectifier should step all that is trained with its gradient: "
                "what another one steps takes no part in the constraint. Found "
                f"{type(optimizer).__name__} about to step {len(foreign)} parameters that the "
                f"{type(self._attached).__name__} of the rectifier does not hold. Give all to one "
                'optimizer; or take Rectifier(model, space="gradient") without an optimizer. '
                "Before a step by a gradient of your own, call zero_grad(set_to_none=True); where "
                "the rectified one was skipped, rectifier.detach() too."
            )
        if found and self.changes_step and not self._is_inside:
            if self._is_over:
                raise self._again(optimizer)
            self._others.add(id(optimizer))

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        if id(optimizer) in self._others:
            self._others.discard(id(optimizer))
            # One that stands around the attached one has let it step meanwhile, or did not step.
            if not self._is_over and self._has_stepped(optimizer):
                self._left.clear()
                raise ValueError(
                    "In update space the optimizer of the rectifier should take the step, which is "
                    f"rectified there. Found that {type(optimizer).__name__} has stepped its "
                    f"parameters, and that {type(self._attached).__name__} has not: this step was "
                    "not rectified. Call rectifier.attach(optimizer) with the one that steps, also "
                    "where it was made anew, and then rectifier.backward; before steps by your own "
                    "gradients, where the rectified one was skipped, rectifier.detach()."
                )

    def enter(self) -> None:
        if self.changes_step and self._is_over and self._stepped_by(self._attached):
            raise self._again(self._attached)
        woken = self._left.keys() & self._resting - set(map(id, at_rest_in(self._attached)))
        if woken and not self.changes_step and not self._is_over:
            raise ValueError(
                "The learning rates of a rectified step should be there before its gradient: what "
                f"has none takes no part in the constraint. Found {len(woken)} parameters that got "
                "one since. Set it before rectifier.backward."
            )
        self._is_inside = True

    def leave(self) -> None:
        self._is_inside, self._is_over = False, True
        for tensor in self._left.keys() & self._held:  # others may still be clipped
            self._left[tensor].note_step()

    def check_over(self) -> None:
        if self.changes_step and not self._is_over and any(k.is_there for k in self._left.values()):
            raise ValueError(
                "An optimizer should be attached between two steps. Found a gradient that was left "
                f"for the step of {type(self._attached).__name__}, which did not come. Call "
                "zero_grad(), attach the other one, and then rectifier.backward."
            )

    def look_back(self, notices: Notices) -> None:
        if self.changes_step and not self._is_over:
            notices.moved(sum(known.has_moved for known in self._left.values()))

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The tensors with a gradient that was left, to which the optimizer gives a rate."""
        groups = [group for group in optimizer.param_groups if group.get("lr") != 0]
        own = [tensor for group in groups for tensor in group["params"]]
        there = [t for t in own if t.grad is not None and id(t) in self._left]
        return [t for t in there if self._left[id(t)].is_same] if self._is_over else there

    def _has_stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it has moved anything, which fused ones do not tell."""
        is_fused = any(group.get("fused") for group in optimizer.param_groups)
        return is_fused or any(known.has_moved for known in self._left.values())

    def _again(self, optimizer: torch.optim.Optimizer) -> ValueError:
        return ValueError(
            "A rectified step should be taken once for each gradient: a second step by the same "
            f"gradient would not be rectified. Found another `step()`, of "
            f"{type(optimizer).__name__}. Call `rectifier.backward` before each step, or rectify "
            'the gradient itself by space="gradient".'
        )


class _Known:
    """A parameter and the gradient that was left in it, as they were then."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.grad is not None
        self._tensor, self._grad = ref(tensor), ref(tensor.grad)
        self._moved = tensor._version
        self._stepped: int | None = None  # the version of the gradient when the step was taken

    @property
    def is_same(self) -> bool:
        """Whether that gradient still lies there, clipped or not; as it is since it was stepped."""
        tensor, grad = self._tensor(), self._grad()
        if tensor is None or grad is None or tensor.grad is not grad:
            return False
        return self._stepped in (None, grad._version)

    @property
    def is_there(self) -> bool:
        """Whether that gradient still lies there, and is not zero."""
        grad = self._grad()
        return self.is_same and grad is not None and bool(grad.any())

    @property
    def has_moved(self) -> bool:
        """Whether the parameter was written since."""
        tensor = self._tensor()
        return tensor is not None and tensor._version != self._moved

    def note_step(self) -> None:
        """The step was taken: what writes from now on makes another gradient of it."""
        grad = self._grad()
        self._stepped = None if grad is None else grad._version
