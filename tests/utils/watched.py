"""A short run of GA, with every gradient and loss of it taken a second time by plain autograd."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geffect import Recorder, Run, open_run
from geffect.objectives import nll
from tests.utils import reference, tiny

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Watched:
    """A run, and by step what plain autograd says of it."""

    run: Run
    gradients: list[dict[str, Named]]
    losses: list[dict[str, float]]


def watched(path: Path, *, clip: float | None = None, every: int = 1, steps: int = 4) -> Watched:
    """GA on a GPT-2 in float64 under SGD, its gradient clipped to a length where one is given."""
    model = tiny.gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradients, losses = [], []
    schedule = {} if every == 1 else {"when": lambda step: step % every == 0}
    with Recorder(model, path, update=True, **schedule) as recorder:
        for pair in tiny.pairs(steps):
            naive = {side: reference.nll(model, pair[side]) for side in ("forget", "retain")}
            own = {side: reference.gradient(model, loss) for side, loss in naive.items()}
            own["objective"] = {name: -g for name, g in own["forget"].items()}
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(model, pair["forget"]),
                retain=nll(model, pair["retain"]),
            )
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            own["update"] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
            gradients.append(own)
            losses.append({side: float(loss.detach()) for side, loss in naive.items()})
    return Watched(open_run(path), gradients, losses)
