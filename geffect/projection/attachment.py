"""An optimizer and who looks after its steps."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch

from geffect.hooks import Hooks, weakly
from geffect.interrupts import put_back_after

Hook = Callable[[], None]

_attached: "WeakKeyDictionary[torch.optim.Optimizer, ref[Any]]" = WeakKeyDictionary()
"""Who looks after the steps of an optimizer."""


class Attachment:
    """Two methods of one owner that are called around every step of an optimizer.

    An optimizer has one such owner, as `check_unattached` sees to, and does not keep it alive.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Hook, after: Hook) -> None:
        self.optimizer = optimizer
        owner = ref(before.__self__)  # type: ignore[attr-defined]
        first, last = weakly(before), weakly(after)

        def pre(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if owner() is None:
                return
            _, *positional = args  # the first is the optimizer itself
            closure = positional[0] if positional else kwargs.get("closure")
            if closure is not None:
                raise ValueError(
                    "`optimizer.step` should be called without a closure when its step is "
                    f"rectified. Found a closure given to {type(optimizer).__name__}, which "
                    "computes gradients that were never rectified. Call step() alone, with an "
                    "optimizer that needs no closure; or detach() the rectifier from this one."
                )
            first()

        self._pre, self._post = pre, lambda *_: last()
        self._before, self._after = Hooks(), Hooks()
        for hooks in (self._before, self._after):
            finalize(before.__self__, hooks.remove)  # type: ignore[attr-defined]
        try:
            self._before.add(optimizer.register_step_pre_hook, pre)
            self._after.add(optimizer.register_step_post_hook, self._post)
            _attached[optimizer] = owner
        except BaseException:
            self.end()
            raise

    def come_closest(self) -> None:
        """Be the last that is called before the step, and the first that is called after it.

        What others have registered sees the step as it is then, and where it raises nothing is
        left undone.
        """
        register = self.optimizer.register_step_pre_hook
        put_back_after(
            lambda: self._before.add(register, partial(self._pre)),
            lambda: self._before.remove(keep=1),
        )
        hooks: Any = self.optimizer._optimizer_step_post_hooks
        for key in [key for key, hook in hooks.items() if hook is self._post]:
            hooks.move_to_end(key, last=False)

    def end(self) -> None:
        """Leave the optimizer alone from now on."""
        self._before.remove()
        self._after.remove()
        _attached.pop(self.optimizer, None)


def check_unattached(optimizer: torch.optim.Optimizer, owner: object) -> None:
    """Refuse an optimizer whose steps somebody else looks after."""
    known = _attached.get(optimizer)
    other = None if known is None else known()
    if other is not None and other is not owner:
        raise ValueError(
            "An optimizer should have one rectifier. Found another one that is attached to it. "
            "Call detach() on that one before."
        )


def check_steps_alone(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that takes its gradients itself, several a step.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> check_steps_alone(torch.optim.LBFGS([weight]))
    Traceback (most recent call last):
    ValueError: `step` of the optimizer should need no closure: ... such as AdamW.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            "`step` of the optimizer should need no closure: a step is rectified with the one "
            f"gradient that was taken before it. Found {type(optimizer).__name__}, which takes "
            "several. Use one that steps by itself, such as AdamW."
        )
