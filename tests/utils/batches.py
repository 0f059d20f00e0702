"""Runs whose steps were measured on several batches, written from their Gram matrices."""

from pathlib import Path

import numpy as np

from geffect import Run, open_run
from geffect.layers import Parameter
from geffect.store.schema import VERSION, Contents, Row
from geffect.store.writer import RunWriter

SOURCES = ("objective", "forget", "retain", "update")


def write(path: Path, grams: dict[int, np.ndarray], numbers: int = 2) -> Run:
    """A run of Gram matrices (row, parameter, source, source) by step, of so many numbers each."""
    parameters = [
        Parameter(
            name=f"model.layers.{i}.mlp.up_proj.weight", layer=f"layer {i}", group="shallow",
            index=i, module="mlp.up_proj", shape=(numbers,), dtype="float32", tied_to=(),
        )
        for i in range(next(iter(grams.values())).shape[1])
    ]  # fmt: skip
    writer = RunWriter(path, parameters)
    manifest = {"format_version": VERSION, "rectifier": None, "metadata": {}}
    writer.begin(Contents(sources=SOURCES, manifest=manifest))
    for step, rows in grams.items():
        for batch, gram in enumerate(rows):
            writer.append(Row(step=step, batch=batch, losses=np.full(4, np.nan), gram=gram))
    writer.close(complete=True)
    return open_run(path)
