"""What the tests of rectification share: models, optimizers, and rectified runs."""

from typing import Any

import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.objectives import nll
from tests.utils import tiny


def placed(space: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The arguments that put a rectifier into a space."""
    return {"space": space, **({"optimizer": optimizer} if space == "update" else {})}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


def run(
    rectifier_options: dict[str, Any],
    optimizer_of: Any = lambda p: torch.optim.AdamW(p, lr=1e-3),
    steps: int = 8,
) -> list[tuple[Tensor, Tensor]]:
    """(applied step, retain average) of every step of GA on a tiny Llama, flat."""
    model = tiny.llama(layers=1)
    optimizer = optimizer_of(model.parameters())
    stepped = placed(rectifier_options.pop("space", "gradient"), optimizer)
    rectifier = Rectifier(model, ema=0.3, **stepped, **rectifier_options)
    seen = []
    for pair in tiny.pairs(steps, seed=0):
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        optimizer.zero_grad()
        rectifier.backward(
            objective={"forget": -1.0},
            forget=nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
        )
        optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        average = rectifier.watched["retain_ema"]
        seen.append((before - after, torch.cat([r.reshape(-1).clone() for r in average])))
    rectifier.detach()
    return seen


def cosines(seen: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [
        float(torch.dot(a.double(), b.double()) / a.double().norm() / b.double().norm())
        for a, b in seen
    ]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def losses_of(model: nn.Module, pair: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {side: nll(model, batch) for side, batch in pair.items()}


class Scaler:
    """A GradScaler whose scale is what is said, on a device that has none."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scale(self, loss: Tensor) -> Tensor:
        return self.factor * loss

    def is_enabled(self) -> bool:
        return True
