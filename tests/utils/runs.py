"""Run files of synthetic rows, and whether what is read is what was written."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from geffect.layers import Parameter
from geffect.sketch import Sketch
from geffect.store.schema import RECTIFICATION_COLUMNS, WEIGHT_STATISTICS, Contents, Row
from geffect.store.writer import RunWriter

from .seals import seal

SOURCES = ("objective", "forget", "retain")
BLOCKS = ("layer 0", "head")
PARAMETERS = (
    Parameter("layers.0.weight", "layer 0", "deep", 0, "weight", (2, 3), "float32", ()),
    Parameter("lm_head.weight", "embedding+head", "head", -1, "w", (), "bfloat16", ("embed", "x")),
)
WEIGHTS = ("npo", "wga")
SKETCH = Sketch(seed=3, width=7)


MANIFEST = {"metadata": {"method": "GA", "naïve": [1, None, 2.5]}, "rectifier": {"scope": "layer"}}
ODD = [0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 5e-324, 1e308]


def squared(step: int) -> float:
    return float((step + 1) ** 2)


def row_of(
    step: int,
    *,
    value: float | None = None,
    gram: np.ndarray | None = None,
    losses: np.ndarray | None = None,
    rectification: np.ndarray | None = None,
) -> Row:
    """A row whose gradients are all of the length step + 1."""
    square = squared(step) if value is None else value
    shape = (len(PARAMETERS), len(SOURCES), len(SOURCES))
    return Row(
        step=step,
        request=0,
        lr=1.0 / (step + 1),
        wall_seconds=step * 0.5,
        losses=np.full(len(SOURCES), float(step)) if losses is None else losses,
        gram=np.full(shape, square) if gram is None else gram,
        rectification=rectification,
    )


def plain_rows(count: int, *, first: int = 0) -> list[Row]:
    return [row_of(step) for step in range(first, first + count)]


def odd_row(step: int) -> Row:
    """A row of numbers that a careless writer would change."""
    shifted = np.roll(ODD, step)
    return Row(
        step=step,
        request=step // 2,
        batch=step % 3,
        epoch=shifted[2],
        lr=shifted[0],
        wall_seconds=shifted[1],
        n_micro=step + 1,
        clip_scale=shifted[3],
        skipped=step % 2 == 1,
        losses=np.resize(shifted, len(SOURCES)),
        gram=np.resize(shifted, (len(PARAMETERS), len(SOURCES), len(SOURCES))),
        rectification=np.resize(shifted, (len(BLOCKS), len(RECTIFICATION_COLUMNS))),
        weights=np.resize(shifted, (len(WEIGHTS), len(WEIGHT_STATISTICS))),
        sketches=np.resize(np.roll(ODD[:7], step).astype("<f4"), (len(SOURCES), 2, SKETCH.width)),
    )


def contents_of(row: Row) -> Contents:
    return Contents(
        SOURCES,
        MANIFEST,
        blocks=() if row.rectification is None else BLOCKS,
        weights=() if row.weights is None else WEIGHTS,
        sketch=None if row.sketches is None else SKETCH,
    )


def append(to: RunWriter, row: Row) -> None:
    """Append a row, and begin with it where nothing was begun."""
    if not to._begun:
        to.begin(contents_of(row))
    to.append(row)


def recorded(path: Path, rows: list[Row], complete: bool | None = True, **how: bool) -> Path:
    """A file with these rows; not closed where `complete` is None, as a killed writer leaves it."""
    recording = RunWriter(path, PARAMETERS, **how)
    for row in rows:
        append(recording, row)
    if complete is not None:
        recording.close(complete=complete)
        return path
    left = path.read_bytes()
    recording.close(complete=False)
    path.write_bytes(left)
    return path


def assert_same_bits(found: np.ndarray, expected: Any) -> None:
    expected = np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def damage(path: Path, name: str, where: Any, value: float, *, sealed: bool = True) -> None:
    """Change one number of a file, with checksums as if it had been written so, or without."""
    with h5py.File(path, "r+") as file:
        file[name][where] = value
    if sealed:
        seal(path)


PLAIN = Contents(SOURCES, MANIFEST)


def full(*_: object) -> None:
    """In the place of what writes: there is no room."""
    raise OSError(28, "No space left on device")
