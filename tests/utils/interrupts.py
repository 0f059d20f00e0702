"""Interrupts at chosen moments, and what is left of a training then."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import geffect
from geffect.hooks import AFTER_STEPS, BEFORE_STEPS, EveryStep

DRAWS = int(os.environ.get("GEFFECT_KILLS", "0"))
"""How many moments are drawn for each kind of training; 0 for as few as a test asks for."""

ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit, MemoryError)
"""What comes at these moments: the user, the system, and an error."""

REGISTERING = [
    (torch.Tensor, "register_hook"),
    (torch.Tensor, "register_post_accumulate_grad_hook"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "register_forward_pre_hook"),
    (torch.optim.Optimizer, "register_step_pre_hook"),
    (torch.optim.Optimizer, "register_step_post_hook"),
    (EveryStep, "register"),
]
"""All ways to register a hook that the package uses."""


@contextmanager
def interrupted_registration(number: int, *, after: bool) -> Iterator[list[int]]:
    """The hook of this number is registered, or not, and then there is a Ctrl-C; how many came."""
    count = [0]

    def counted(register: Callable[..., Any]) -> Callable[..., Any]:
        def registering(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number and not after:
                raise KeyboardInterrupt
            handle = register(*args, **kwargs)
            if count[0] == number:
                raise KeyboardInterrupt
            return handle

        return registering

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in REGISTERING:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield count


@contextmanager
def interrupted_at_line(number: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Raise at a line of the package, counted from the start of the block; how many came.

    Not in the two lines around what HDF5 calls: C code would make another error of it.
    """
    root = str(Path(geffect.__file__).parent)
    count = [0]

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise error
        return at_line

    def at_call(frame: FrameType, event: str, argument: object) -> Any:
        ours = frame.f_code.co_filename.startswith(root)
        return at_line if ours and frame.f_code.co_name != "finishing" else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield count
    finally:
        sys.settrace(before)


def moments(lines: int, few: int, *, seed: int = 0) -> Iterator[tuple[int, type[BaseException]]]:
    """Some of so many lines at random, none twice, and what is raised there."""
    chance = random.Random(seed)
    for number in chance.sample(range(1, lines + 1), min(DRAWS or few, lines)):
        yield number, chance.choice(ERRORS)


def hooks_left(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[object]:
    """Every hook on a module, a parameter or an optimizer, or on all optimizers."""
    owners: list[Any] = [*model.modules(), *optimizers]
    kept = [v for owner in owners for name, v in vars(owner).items() if "hooks" in name]
    for parameter in model.parameters():
        kept += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    kept += [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    kept += [BEFORE_STEPS.hooks, AFTER_STEPS.hooks]
    found = [hook for hooks in kept for hook in (hooks or {}).values()]
    # By name: a test that imports the package anew has a class of its own for each time.
    return [hook for hook in found if type(hook).__name__ != EveryStep.__name__]


def grads_of(model: nn.Module) -> list[Tensor | None]:
    """A copy of every `.grad`."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    """Whether these are the same numbers, bit for bit."""
    return len(some) == len(others) and all(
        a is b or (a is not None and b is not None and torch.equal(_bits(a), _bits(b)))
        for a, b in zip(some, others, strict=True)
    )


def _bits(vector: Tensor) -> Tensor:
    """The bytes of a tensor: what is no number is equal to itself."""
    return vector.detach().flatten().contiguous().view(torch.uint8)
