"""Hooks that are registered and removed in one way, and a block that puts back what it changed.

An error, an interrupt or a signal may come between any two lines. What is here leaves nothing
behind then: no hook stays where it was registered, and what is put back is put back to its end.
"""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeVar
from weakref import WeakMethod

from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

Found = TypeVar("Found")


class Hooks:
    """Hooks on tensors, modules and optimizers, or on all optimizers, until `remove`.

    Each is noted before it is registered, and found where torch keeps it: so none is left that was
    registered just before an error.

    >>> from torch import nn
    >>> model, hooks = nn.Linear(2, 1), Hooks()
    >>> hooks.add(model.register_forward_hook, print)
    >>> hooks.remove()
    >>> len(model._forward_hooks)
    0
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Callable[..., Any], Callable[..., Any]]] = []

    def add(self, register: Callable[..., Any], hook: Callable[..., Any], **options: bool) -> None:
        """Register a hook by a method of what it is for, or by a function of torch for all."""
        self._noted.append((register, hook))
        register(hook, **options)

    def remove(self, *, keep: int = 0) -> None:
        """Remove all of them but the last `keep`; a second time removes nothing more."""
        to_the_end(lambda: self._remove(keep))

    def _remove(self, keep: int) -> None:
        while len(self._noted) > keep:
            register, hook = self._noted[0]
            kept = list(_kept_by(register))
            ours = {key for hooks in kept for key, known in hooks.items() if known is hook}
            for hooks in kept:
                for key in ours & hooks.keys():
                    del hooks[key]
            del self._noted[0]


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls a bound method for as long as its owner lives, and does not keep it alive.

    >>> class Owner:
    ...     def tell(self) -> None:
    ...         print("called")
    >>> owner = Owner()
    >>> hook = weakly(owner.tell)
    >>> hook()
    called
    >>> del owner
    >>> hook()
    """
    known = WeakMethod(method)

    def hook(*args: Any, **kwargs: Any) -> None:
        if (found := known()) is not None:
            found(*args, **kwargs)

    return hook


def to_the_end(action: Callable[[], None]) -> None:
    """Do something that may be begun anew; an interrupt in its midst waits until it is done."""
    try:
        action()
    except BaseException:
        action()
        raise


def put_back_after(body: Callable[[], Found], put_back: Callable[[], None]) -> Found:
    """What the body returns; whatever it raises, what it changed is put back.

    `put_back` may be called twice, and does the same then: an interrupt in its midst is raised when
    the second time has come to its end. A function, not a context manager, whose own lines an
    interrupt would find unguarded.

    >>> changed = [1]
    >>> put_back_after(lambda: changed.append(2), lambda: changed.__delitem__(slice(1, None)))
    >>> changed
    [1]
    """
    try:
        try:
            return body()
        finally:
            put_back()
    except BaseException:
        put_back()
        raise


def _kept_by(register: Callable[..., Any]) -> Iterable[MutableMapping[int, Any]]:
    """Where torch keeps what is registered by this method, or for all optimizers."""
    owner = getattr(register, "__self__", None)
    if owner is None:
        return _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    if isinstance(owner, Tensor):
        found = (owner._backward_hooks, getattr(owner, "_post_accumulate_grad_hooks", None))
        return [hooks for hooks in found if hooks is not None]
    named = [value for name, value in vars(owner).items() if "hooks" in name]
    return [hooks for hooks in named if isinstance(hooks, MutableMapping)]
