"""Hooks that are registered and removed in one way: none stays where it was registered."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geffect.interrupts import to_the_end


class EveryStep:
    """Hooks on the steps of all optimizers, behind the one of torch that stays.

    Torch goes through its own while an optimizer steps, and fails if another thread, or the garbage
    collector, takes one of them away then. Here they may come and go.

    >>> every = EveryStep()
    >>> every.register(lambda optimizer, args, kwargs: every.hooks.clear())
    >>> every(None, (), {})
    >>> every.hooks
    {}
    """

    def __init__(self) -> None:
        self.hooks: dict[int, Callable[..., Any]] = {}

    def register(self, hook: Callable[..., Any], *, first: bool = False) -> None:
        """Call the hook around each step from now on, before all others or behind them.

        What may refuse a step is first before it and last behind it: others have not begun to
        follow it then, or have ended.
        """
        own = {id(hook): hook}
        self.hooks = {**own, **self.hooks} if first else {**self.hooks, **own}

    def __call__(self, *step: Any) -> None:
        for hook in list(self.hooks.values()):
            hook(*step)


BEFORE_STEPS, AFTER_STEPS = EveryStep(), EveryStep()
register_optimizer_step_pre_hook(BEFORE_STEPS)
register_optimizer_step_post_hook(AFTER_STEPS)


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

    def __reduce__(self) -> tuple[type["Hooks"], tuple[()]]:
        """A copy, which has no hooks anywhere: where there are some, what needs them has none."""
        if self._noted:
            raise TypeError(
                "What follows the steps of an optimizer should not be copied or pickled: its hooks "
                "stay with the original. Found a recorder, a callback or an attached rectifier in "
                "what is copied. Copy the model alone, and make a new one for the copy."
            )
        return Hooks, ()

    def add(self, register: Callable[..., Any], hook: Callable[..., Any], **options: bool) -> None:
        """Register a hook by a method of what it is for."""
        self._noted.append((register, hook))
        register(hook, **options)

    def remove(self, *, keep: int = 0) -> None:
        """Remove all of them but the last `keep`; a second time removes nothing more."""
        to_the_end(lambda: self._remove(keep))

    def _remove(self, keep: int) -> None:
        while len(self._noted) > keep:
            register, hook = self._noted[0]
            kept = list(_kept_by(register))
            # Others come and go meanwhile: those of other threads, and of what is collected.
            ours = {key for hooks in kept for key in list(hooks) if hooks.get(key) is hook}
            for hooks in kept:
                for key in ours:
                    hooks.pop(key, None)
            del self._noted[0]


@contextmanager
def without_forward_hooks(model: nn.Module) -> Iterator[None]:
    """A block in which forwards call no hooks, neither those of the modules nor those of all.

    >>> model, asked = nn.Identity(), Tensor()
    >>> _ = model.register_forward_hook(lambda *_: print("called"))
    >>> with without_forward_hooks(model):
    ...     _ = model(asked)
    >>> _ = model(asked)
    called
    """
    owners = [*map(vars, model.modules()), vars(nn.modules.module)]
    hidden = [
        (owner, name, hooks)
        for owner in owners
        for name, hooks in owner.items()
        if name.endswith(("forward_hooks", "forward_pre_hooks")) and hooks
    ]

    def put_back() -> None:
        for owner, name, hooks in hidden:
            owner[name] = hooks

    try:
        for owner, name, _ in hidden:
            owner[name] = OrderedDict()  # hooks that are removed meanwhile are found in the others
        yield
    finally:
        to_the_end(put_back)


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


def _kept_by(register: Callable[..., Any]) -> Iterable[MutableMapping[int, Any]]:
    """Where it is kept what is registered by this method."""
    owner = register.__self__  # type: ignore[attr-defined]
    if isinstance(owner, Tensor):
        found = (owner._backward_hooks, getattr(owner, "_post_accumulate_grad_hooks", None))
        return [hooks for hooks in found if hooks is not None]
    named = [value for name, value in vars(owner).items() if "hooks" in name]
    return [hooks for hooks in named if isinstance(hooks, MutableMapping)]
