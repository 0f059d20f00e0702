"""Trainers that are rectified from their first step, or stopped and resumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.trainers import rectify
from tests.utils import trainers
from tests.utils.unlearning_trainers import Reports, unlearner


def windows(batches: Sequence[Any], *, epochs: int, each: int) -> list[list[Any]]:
    """The micro-batches of each step: the last of an epoch may have fewer."""
    an_epoch = len(batches) // epochs
    return [
        list(batches[first : min(first + each, start + an_epoch)])
        for start in range(0, len(batches), an_epoch)
        for first in range(start, start + an_epoch, each)
    ]


def rectified(folder: Path, *, rectifier: Any = None, retain: Any = None, **told: Any) -> Any:
    """A rectified trainer with its reports; `rectifier` are the options of one."""
    trainer = unlearner(folder, **told)
    made = Rectifier(trainer.model, **(rectifier or {}))
    rectify(trainer, made, retain=retain)
    trainer.reports = Reports(made)
    trainer.add_callback(trainer.reports)
    return trainer


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """All of it in one vector."""
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
            for g, p in zip(grads, parameters, strict=True)
        ]
    )


def gru(u: Tensor, r: Tensor) -> Tensor:
    return u - min(0.0, float(u @ r)) / (r @ r) * r


def stepped(model: nn.Module, x: Tensor, *, rate: float, limit: float) -> None:
    """A step of gradient descent along x, clipped."""
    x = x * min(1.0, limit / (float(x.norm()) + 1e-6))
    with torch.no_grad():
        for p, part in zip(
            model.parameters(), x.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p -= rate * part.view_as(p)


def shuffled() -> Any:
    return torch.utils.data.DataLoader(trainers.samples(5, seed=70), batch_size=2, shuffle=True)
