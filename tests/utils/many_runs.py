"""Runs of random gradients, as long and as deep as a test needs them, written in no time."""

from pathlib import Path
from typing import Any

import numpy as np

from geffect.layers import Parameter
from geffect.store.schema import RECTIFICATION_COLUMNS, VERSION, Contents, Row
from geffect.store.writer import RunWriter

SOURCES = ("objective", "forget", "retain", "retain_ema", "rectified", "update")
RULE = {"rule": "gru", "scope": "model", "space": "gradient", "protect": ["retain"], "select": None}


def random_run(
    path: Path, steps: int, layers: int = 3, *, seed: int = 0, rectified: bool = False, **told: Any
) -> Path:
    """Steps 0, 1, ... of an NPO run; `told` goes into its manifest.

    A rectified run of one seed has the gradients and losses of one that is not.
    """
    parameters = [
        Parameter(f"layers.{i}.weight", f"layer {i}", "deep", i, "weight", (8,), "float32", ())
        for i in range(layers)
    ]
    sources = SOURCES if rectified else SOURCES[:3]
    manifest = {
        "format_version": VERSION,
        "rectifier": RULE if rectified else None,
        "created": "2020-02-02",
        "model": {"class": "Llama", "trainable_numbers": 8 * layers},
        "metadata": {"seed": seed},
        "versions": {"geffect": "0"},
        "losses": {"objective": "loss", "forget": "loss", "retain": "loss"},
        "objective": {"name": "NPO", "options": {"beta": 0.1}},
        "optimizer": {"class": "AdamW"},
        **told,
    }
    blocks = ("model",) if rectified else ()
    writer = RunWriter(path, parameters)
    writer.begin(Contents(sources, manifest, blocks=blocks))
    rng, further = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    for step in range(steps):
        shared = rng.normal(size=(layers, 3, 8)) * 10.0 ** (2 * np.sin(step / 9))
        own = further.normal(size=(layers, len(sources) - 3, 8))
        vectors = np.concatenate([shared, own], axis=1)
        losses = np.full(len(sources), np.nan)
        losses[:3] = [-1.0, 0.01 + 3 * (1 - np.exp(-step / 20)), 0.1 + 0.01 * step]
        fired = np.abs(further.normal(size=(1, len(RECTIFICATION_COLUMNS))))
        fired[:, 0] = step % 2
        writer.append(
            Row(
                step=step,
                losses=losses,
                gram=np.einsum("pik,pjk->pij", vectors, vectors),
                rectification=fired if rectified else None,
            )
        )
    writer.close(complete=True)
    return path
