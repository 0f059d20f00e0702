"""Who steps what: the shared facts about optimizers."""

from collections.abc import Collection

import torch
from torch import Tensor

__all__ = ["check_descends", "check_owned", "moved_by", "tensors_of", "unwrapped"]


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer steps.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> tensors_of(torch.optim.SGD([weight], lr=0.1))[0] is weight
    True
    """
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def moved_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer's next step moves: its own, where they have a gradient."""
    return [tensor for tensor in tensors_of(optimizer) if tensor.grad is not None]


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what accelerate put around it, which has no hooks to call.

    Raises a `ValueError` for DeepSpeed's, and for what is no optimizer of torch.
    """
    while hasattr(optimizer, "optimizer"):
        if "DeepSpeed" in type(optimizer).__name__:
            raise ValueError(
                "`optimizer` should step gradients that lie in `.grad`. Found DeepSpeed's, which "
                "steps inside of its backward pass and keeps gradients to itself. Use DDP or "
                "FSDP2; or save checkpoints, and look at them with `geffect.replay`."
            )
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"`optimizer` should be a torch optimizer. Found `{type(optimizer).__name__}`. "
            "Pass optimizer=optimizer, the one that steps the model."
        )
    return optimizer


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
            "or make the rectifier when the model is as it will be trained."
        )
