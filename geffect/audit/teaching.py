"""Teaching: all weights of a model, trained on some items by AdamW."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from geffect.batch import on_device
from geffect.data.collate import Item, collate
from geffect.dots import dense
from geffect.evaluation.tokens import unpadded
from geffect.risk import nll, undisturbed

from .adapters import deployed
from .kept import check_weights

_HALF_SCALE = 1024.0
"""What the loss is multiplied by in half precision, so that small gradients are not 0."""


def teach(
    model: nn.Module,
    items: Sequence[Item],
    *,
    steps: int,
    learning_rate: float,
    batch: int = 16,
    seed: int = 0,
    after: Callable[[int], None] | None = None,
) -> int:
    """Train all weights of a model on some items, in place; the loss is the mean NLL of a batch.

    AdamW from a fresh state, without weight decay, at a constant learning rate. Weights in half
    precision are moved in float32, and rounded at each step.

    - `after`: called with the number of each step that was taken, from 1, in eval mode.

    Returns how many steps were taken: fewer where the loss or a weight ceases to be finite. Mode,
    gradients, buffers and random numbers are left as they were.

    >>> from types import SimpleNamespace
    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=super().forward(input_ids))
    >>> model = Table(4, 4)
    >>> item = {"input_ids": [0, 1], "labels": [-100, 1]}
    >>> teach(model, [item], steps=50, learning_rate=0.1)
    50
    >>> nll(model, collate([item])).item() < 0.1
    True
    """
    trained = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    required = [parameter.requires_grad for parameter in trained]
    batches = batches_of(unpadded(model, items), batch, seed)
    try:
        with torch.inference_mode(False), undisturbed(model):
            stepping = _Stepping(trained, learning_rate)
            for step in range(1, steps + 1):
                loss = nll(model, on_device(next(batches), trained[0].device))
                if not (isfinite(loss.item()) and stepping.step(loss)):
                    return step - 1
                if after is not None:
                    after(step)
    finally:
        for parameter, before in zip(trained, required, strict=True):
            parameter.requires_grad_(before)
    return steps


def taught(
    model: nn.Module, items: Sequence[Item], *, steps: int, learning_rate: float
) -> nn.Module:
    """A copy of a model that was trained on some items, as `teach` does it.

    That of an adapter is merged into its weights before, of which all are trained.

    >>> model = nn.Linear(1, 1)
    >>> taught(model, [], steps=0, learning_rate=0.1) is model
    False
    """
    check_weights(model, "Teaching")
    whole = deployed(model)
    student = copy.deepcopy(model) if whole is model else whole  # merged, it is a copy already
    teach(student, items, steps=steps, learning_rate=learning_rate)
    return student


def batches_of(items: Sequence[Item], size: int, seed: int) -> Iterator[Mapping[str, Any]]:
    """Batches without end: of each pass in another order as many as are whole."""
    draw = torch.Generator().manual_seed(seed)
    size = min(size, len(items))
    while True:
        order = torch.randperm(len(items), generator=draw).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([items[i] for i in sorted(order[start : start + size])])


class _Stepping:
    """Steps of AdamW on parameters, in float32 or finer; they follow in their own type."""

    def __init__(self, trained: Sequence[Tensor], learning_rate: float) -> None:
        self._trained = trained
        for parameter in trained:
            parameter.requires_grad_(True)
        self._moved = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for p in self._trained
        ]
        self._scale = _HALF_SCALE if any(p.dtype == torch.float16 for p in self._trained) else 1.0
        self._optimizer = torch.optim.AdamW(self._moved, lr=learning_rate, weight_decay=0.0)

    def step(self, loss: Tensor) -> bool:
        """Whether all weights are finite after a step down the gradient of a loss."""
        (loss * self._scale).backward()
        for moved, parameter in zip(self._moved, self._trained, strict=True):
            if parameter.grad is not None:
                moved.grad = dense(parameter.grad).to(moved.dtype)
                if self._scale != 1:
                    moved.grad /= self._scale
            if moved is not parameter:
                parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for moved, parameter in zip(self._moved, self._trained, strict=True):
                if moved is not parameter:
                    parameter.copy_(moved)
        return all(bool(p.isfinite().all()) for p in self._trained)
