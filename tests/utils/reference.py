"""Every quantity once more, by plain autograd and a loop: slow, obvious, shared with nothing."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def nll(model: Any, batch: Batch) -> Tensor:
    """Token mean of -log p over the labelled tokens, one token at a time."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = [
        -torch.log_softmax(logits[row, position - 1], dim=-1)[label]
        for row, labels in enumerate(batch["labels"])
        for position, label in enumerate(labels)
        if position > 0 and label != -100
    ]
    return torch.stack(losses).mean()


def token_log_p(model: Any, batch: Batch) -> list[list[Tensor]]:
    """log p of the labelled tokens, a list a sample: of those that have one before them."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    masks = batch["attention_mask"]
    return [
        [
            torch.log_softmax(logits[row, position - 1], dim=-1)[label]
            for position, label in enumerate(labels)
            if label != -100 and masks[row, :position].any()
        ]
        for row, labels in enumerate(batch["labels"])
    ]


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient by parameter name, zero where the loss does not reach."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str | None = None) -> float:
    """<a, b> in float64, of one parameter or of all."""
    names = list(a) if name is None else [name]
    return sum(float((a[n].double() * b[n].double()).sum()) for n in names)


def gru(u: Tensor, r: Tensor) -> Tensor:
    """The nearest vector to u that does not oppose r."""
    along = torch.dot(u, r)
    return u if along >= 0 else u - along / torch.dot(r, r) * r


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """All of it in one vector."""
    return torch.cat([g.reshape(-1) for g in gradients.values()])


def trained(
    model: nn.Module,
    batches: list[dict[str, Batch]],
    loss_of: Callable[[Any, dict[str, Batch]], Tensor],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> nn.Module:
    """A copy of the model after one plain optimizer step a batch."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model.parameters())
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
