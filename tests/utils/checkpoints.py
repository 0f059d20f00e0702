"""Checkpoints of a tiny model, its data, and its gradients once more."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from geffect.analysis import g_effect
from geffect.objectives import FrozenModel, as_objective
from tests.utils import reference, tiny

GA = {"forget": -1.0}
FORGET = [tiny.batch(i, rows=2) for i in range(4)]
RETAIN = [tiny.batch(20 + i, rows=3, padding=i) for i in range(4)]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def naive(
    model: nn.Module, objective: Any, forget: Any, retain: Any, before: nn.Module | None = None
) -> dict[str, Any]:
    """The gradient of every source on one batch, by autograd."""
    risks = {"forget": reference.nll(model, forget), "retain": reference.nll(model, retain)}
    compared = None if before is None else FrozenModel(before)
    pair = {"forget": forget, "retain": retain}
    loss = as_objective(objective)(model, pair, compared)
    every = {"objective": loss, **risks}
    return {name: reference.gradient(model, value) for name, value in every.items()}


def effects(run: Any) -> dict[tuple[int, str], float]:
    table = g_effect(run, by="model")
    return {(row.step, row.effect): row.value for row in table.itertuples()}
