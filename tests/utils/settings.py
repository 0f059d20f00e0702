"""Run files of named objectives, on a model of one layer: what they say, not what they do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geffect import Recorder, Rectifier
from geffect.objectives import Objective, named


def recorded(
    path: Path,
    objective: str | Objective | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    retain: bool = True,
    rectified: bool = False,
    **how: Any,
) -> Path:
    """Three steps of ascent on a risk, told to be of an objective, with implicit weights of 1/step.

    - `weights`: the names of the implicit weights, and by what they are multiplied.
    """
    torch.manual_seed(0)
    told = named(objective, options) if isinstance(objective, str) else objective
    model = nn.Linear(3, 1)
    rectifier = Rectifier(model) if rectified else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, path, objective=told, update=True, **how) as recorder:
        for step in range(3):
            losses = {"forget": model(torch.eye(3)[step]).sum() ** 2}
            if retain:
                losses["retain"] = model(torch.ones(3) - 0.3 * step).sum() ** 2
            recorder.backward(
                objective={"forget": -1.0},
                **losses,
                rectifier=rectifier,
                weights={
                    name: torch.full((2,), factor / (step + 1))
                    for name, factor in (weights or {}).items()
                },
            )
            optimizer.step()
            optimizer.zero_grad()
        for name, columns in (tables or {}).items():
            recorder.keep_table(name, columns)
    return path
