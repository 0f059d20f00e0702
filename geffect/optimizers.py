"""Optimizers: which tensors one steps, what it is told apart by, and which are refused."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from geffect import distributed


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer steps.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> tensors_of(torch.optim.SGD([weight], lr=0.1))[0] is weight
    True
    """
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def moved_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the next step moves: the optimizer's own with a gradient, not at rest."""
    resting = set(map(id, at_rest_in(optimizer)))
    own = [tensor for tensor in tensors_of(optimizer) if tensor.grad is not None]
    return [tensor for tensor in own if id(tensor) not in resting]


def at_rest_in(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of groups whose learning rate is 0 where that of others is not: they are frozen.

    Where all are 0, as in the first step of a warmup, none is at rest beside others.

    >>> a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    >>> groups = [{"params": [a], "lr": 0.0}, {"params": [b]}]
    >>> [tensor is a for tensor in at_rest_in(torch.optim.SGD(groups, lr=0.1))]
    [True]
    """
    still = [
        group.get("lr") is not None and float(group["lr"]) == 0 for group in optimizer.param_groups
    ]
    if all(still):
        return []
    groups = zip(optimizer.param_groups, still, strict=True)
    return [tensor for group, rests in groups if rests for tensor in group["params"]]


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what accelerate put around it, which has no hooks to call.

    One that has hooks is taken as it is, whatever it steps by: what it does around that is a part
    of its step. DeepSpeed's is what stands for it. Raises a `ValueError` for that of an engine that
    nobody looks at, and for what is no optimizer of torch.
    """
    foreign = False
    while (behind := distributed.optimizer_behind(optimizer)) is None:
        if _has_hooks(optimizer) or not hasattr(optimizer, "optimizer"):
            break
        foreign = foreign or "DeepSpeed" in type(optimizer).__name__
        optimizer = optimizer.optimizer
    if behind is not None:
        return behind
    if foreign:
        raise ValueError(
            "`optimizer` should be that of the engine which is the model. Found DeepSpeed's, and a "
            "model outside of an engine. Pass what `deepspeed.initialize` gave: the engine as "
            "the model, and `optimizer=engine.optimizer`."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"`optimizer` should be a torch optimizer. Found `{type(optimizer).__name__}`. "
            "Pass optimizer=optimizer, the one that steps the model."
        )
    if not _has_hooks(optimizer):
        raise ValueError(
            "`optimizer` should be made by `torch.optim.Optimizer.__init__`, so that its steps can "
            f"be followed. Found `{type(optimizer).__name__}`, which leaves that out. Pass the "
            "optimizer inside of it, or let its `__init__` call `super().__init__`."
        )
    return optimizer


def _has_hooks(optimizer: object) -> bool:
    """Whether it is an optimizer that `torch.optim.Optimizer.__init__` has made."""
    made = hasattr(optimizer, "_optimizer_step_pre_hooks")
    return made and isinstance(optimizer, torch.optim.Optimizer)


def described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer and the options of its parameter groups."""
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: v for key, v in group.items() if isinstance(v, int | float | tuple)}
            for group in optimizer.param_groups
        ],
    }


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group; NaN where the optimizer makes its own, or has none.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> rate_of(torch.optim.Optimizer([weight], {"lr": None}))
    nan
    """
    rate = optimizer.param_groups[0].get("lr")
    return float("nan") if rate is None else float(rate)


ROUNDING = 1e-6
"""Of a learning rate, in terms of the one that its schedule starts from."""


def check_descends(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that climbs: G-effects and rectifiers take a step to go down.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> check_descends(torch.optim.SGD([weight], lr=0.1, maximize=True))
    Traceback (most recent call last):
    ValueError: `maximize` of SGD should be False: ... Negate the loss instead.
    """
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise ValueError(
            f"`maximize` of {type(optimizer).__name__} should be False: a gradient is taken for "
            "what the step goes down. Found `maximize = True`, with which every sign would be "
            "wrong. Negate the loss instead."
        )
    for group in optimizer.param_groups:
        rate = group.get("lr")
        # A schedule that ends at zero may pass it by a rounding.
        if rate is not None and rate < -ROUNDING * abs(group.get("initial_lr", rate)):
            raise ValueError(
                f"The learning rate of {type(optimizer).__name__} should not be negative: a "
                f"gradient is taken for what the step goes down. Found {float(rate)}, with which "
                "every sign would be wrong. Negate the loss instead."
            )


def check_owned(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> None:
    """Refuse an optimizer that steps other tensors than the model's parameters."""
    own = set(map(id, parameters))
    tensors = tensors_of(optimizer)
    if not own.intersection(map(id, tensors)):
        raise ValueError(
            "`optimizer` should step the parameters of `model`. Found one that has none of "
            "them. Make it from model.parameters()."
        )
    foreign = [
        tensor
        for tensor in tensors
        if id(tensor) not in own and (tensor.requires_grad or tensor.grad is not None)
    ]
    if foreign:
        raise ValueError(
            "`optimizer` should step the parameters of `model` and no others, which nothing "
            f"here could rectify. Found others, {len(foreign)} in number, that are not the model's "
            "or were unfrozen since the rectifier was made. Give those an optimizer of their own, "
            "or make the rectifier after choosing the parameters to train."
        )
