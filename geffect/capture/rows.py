"""From what was measured of the gradients of a step to the row of a run file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geffect.gradients import GradientTransform
from geffect.store.schema import RECTIFICATION_COLUMNS, Row

from .collector import Measurement
from .header import Declared, RunHeader


@dataclass(frozen=True)
class Entry:
    """One step, or one batch of it, as its recorder describes it.

    - `sources`: all that the run is going to have, which its first row fixes; those that it has
      itself, unless said.
    - `stepped`: Bool[parameter], what the step moves; None where that is not known.
    - `weights`: mean, median, 95th percentile and maximum of implicit weights, by name.
    - `optimizer`: its description, for the manifest.
    """

    step: int
    measured: Measurement
    declared: Declared
    request: int = 0
    batch: int = 0
    epoch: float = float("nan")
    lr: float = float("nan")
    n_micro: int = 1
    clip_scale: float = 1.0
    skipped: bool = False
    stepped: Sequence[bool] | None = None
    rectifier: GradientTransform | None = None
    optimizer: Mapping[str, Any] | None = None
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sources: Sequence[str] | None = None


def row(
    known: RunHeader,
    entry: Entry,
    *,
    lengths: NDArray[np.float64] | None,
    wall_seconds: float,
) -> Row:
    """The row: every number at the index that the first row of the run gave to its source.

    `lengths` are those of the parameters after the step.
    """
    measured = entry.measured
    sketches = measured.sketches
    return Row(
        request=entry.request,
        step=entry.step,
        batch=entry.batch,
        epoch=entry.epoch,
        lr=entry.lr,
        wall_seconds=wall_seconds,
        n_micro=entry.n_micro,
        clip_scale=entry.clip_scale,
        skipped=entry.skipped,
        stepped=None if entry.stepped is None else np.array(entry.stepped),
        lengths=lengths,
        losses=_spread(known, np.array([*measured.losses.values()]), [*measured.losses]),
        gram=_spread_gram(known, measured.names, measured.gram),
        expert_gram=None
        if measured.expert_gram is None
        else _spread_gram(known, measured.names, measured.expert_gram),
        rectification=_report(known, entry.rectifier),
        weights=_statistics(known, entry.weights),
        sketches=None if sketches is None else _spread(known, sketches.numpy(), measured.names),
        gradients=measured.gradients,
        arrived=measured.arrived,
    )


def _spread(known: RunHeader, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The values at the indices of their sources, NaN at those of the others."""
    sources = known.sources
    spread = np.full((len(sources), *values.shape[1:]), np.nan, dtype=values.dtype)
    spread[[sources.index(name) for name in names]] = values
    return spread


def _spread_gram(known: RunHeader, names: Sequence[str], gram: Tensor) -> np.ndarray:
    k = len(known.sources)
    indices = np.array([known.sources.index(name) for name in names], dtype=int)
    spread = np.full((len(gram), k, k), np.nan)
    spread[:, indices[:, None], indices] = gram.numpy()
    return spread


def _statistics(known: RunHeader, weights: Mapping[str, Sequence[float]]) -> np.ndarray | None:
    if not known.weights:
        return None
    absent = (float("nan"),) * 4
    return np.array([weights.get(name, absent) for name in known.weights])


def _report(known: RunHeader, rectifier: GradientTransform | None) -> np.ndarray | None:
    if not known.blocks:
        return None
    report = None if rectifier is None else rectifier.report
    if report is None:
        return np.full((len(known.blocks), len(RECTIFICATION_COLUMNS)), np.nan)
    return np.array([getattr(report, column) for column in RECTIFICATION_COLUMNS]).T
