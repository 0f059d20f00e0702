"""Drift: how far the direction of a gradient turns from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect import sketch
from geffect.encodings import ENCODINGS
from geffect.groups import By, label_of
from geffect.layers import Parameter, in_network_order
from geffect.scores import COSINE, Score, beside, tidy
from geffect.sources import RETAIN
from geffect.store import Run

from .base import Floats, check_run, column_of, in_space
from .rectified import named

Gradients = tuple[Run, str]
"""A source of a run."""

_AT_ONCE = 2**16  # coordinates that are cast to float64 at a time


def drift(
    run: Run,
    source: str = RETAIN,
    other: Run | None = None,
    other_source: str | None = None,
    by: By = "layer",
) -> pd.DataFrame:
    """cos(g at step s, h at step t) = <g, h> / (|g| |h|) for every s and t.

    g is the gradient of `source` in `run`. h is the gradient of `other_source` in the run `other`;
    both are those of g if left out. A gradient with itself shows how long its direction lasts. Two
    runs show whether they go the same way.

    Columns: step, other_step, `by`, value, error, score, unit. Where the runs have sketches,
    `error` is the standard error of the estimate: (1 - value^2) / sqrt(width) for a layer, and for
    several layers what their errors add up to. Otherwise the stored gradients are taken, at the
    steps and for the parameters that were stored, and `error` is that of their encoding: 0 for
    "full". The value is NaN where a gradient is zero or absent.

    Layers are the smallest blocks: `by` is "layer", "group", "model", or a function that keeps the
    tensors of a layer together. The rows of one `other_step` are a table that any plot can draw.
    Raises a ValueError for runs without sketches and stored gradients, for sketches of two kinds,
    and for runs of two models.

    >>> run = example_run(sketch=True)
    >>> drift(run, "forget", other_source="retain", by="model").drop(columns=["score", "unit"])
       step  other_step  model  value     error
    0     0           0  model    0.5  0.011719
    """
    check_run(run)
    if other is not None:
        check_run(other)
    other_source = source if other_source is None else other_source
    ours, theirs = (run, source), (run if other is None else other, other_source)
    sketched = all(of.contents.sketch for of, _ in (ours, theirs))
    stored = all(of.contents.gradients for of, _ in (ours, theirs))
    products = _stored(ours, theirs) if stored and not sketched else _sketched(ours, theirs)
    blocks, value, error = _cosines(products, by)
    a, b = (
        named(of, name) if other is None else f"{named(of, name)} of {of.name}"
        for of, name in (ours, theirs)
    )
    table = tidy(
        value.reshape(-1, len(blocks)),
        in_space(run, Score(f"cosine of {a} at a step and {b} at another", COSINE)),
        steps=np.repeat(products.steps, len(products.other_steps)),
        blocks=blocks,
        by=column_of(by),
    )
    every = np.tile(np.repeat(products.other_steps, len(blocks)), len(products.steps))
    table.insert(1, "other_step", every)
    return beside(table, "error", error.reshape(-1))


@dataclass(frozen=True)
class _Products:
    """What the cosines of two gradients follow from, by layer.

    `inner` is an array (layer, step, other step), the squared norms are (layer, step). Two parts
    make up the error: the inner products of a sketch vary by `1 / width`, and a cosine of `n`
    numbers that were rounded by `rounding / sqrt(n)`.
    """

    parameters: Sequence[Parameter]
    steps: NDArray[np.int64]
    other_steps: NDArray[np.int64]
    inner: Floats
    squares: Floats
    other_squares: Floats
    per_width: float = 0.0
    rounding: float = 0.0


def _cosines(products: _Products, by: By) -> tuple[list[str], Floats, Floats]:
    """The blocks, and the cosines and their errors (step, other step, block)."""
    labels = list(map(label_of(by), products.parameters))
    of_layer: dict[str, str] = {}
    for parameter, label in zip(products.parameters, labels, strict=True):
        if of_layer.setdefault(parameter.layer, label) != label:
            raise ValueError(
                "`by` should keep the tensors of a layer together: gradients of different steps "
                f"are compared by layer. Found `{label}` and `{of_layer[parameter.layer]}` in "
                f"`{parameter.layer}`. Choose layer, group or model."
            )
    blocks = in_network_order(products.parameters, labels)
    cosines, errors = [], []
    for block in blocks:
        members = [label == block for label in of_layer.values()]
        numel = sum(p.numel for p in products.parameters if of_layer[p.layer] == block)
        cosine, variance = _cosine(
            products.inner[members],
            products.squares[members][:, :, np.newaxis],
            products.other_squares[members][:, np.newaxis, :],
        )
        cosines.append(cosine)
        errors.append(np.sqrt(variance * products.per_width + products.rounding**2 / numel))
    value, error = np.stack(cosines, axis=-1), np.stack(errors, axis=-1)
    return blocks, value, np.where(np.isnan(value), np.nan, error)


def _cosine(inner: Floats, squares: Floats, other_squares: Floats) -> tuple[Floats, Floats]:
    """The cosine of vectors that consist of layers, and its variance in sketches of width 1.

    To first order the error of the cosine c is that of <g, h> / (|g| |h|) - c/2 (|g|^2 / |g|^2 +
    |h|^2 / |h|^2), a quadratic form of normal numbers; the layers' are independent. With one layer
    its variance is (1 - c^2)^2.
    """
    g, h = squares.sum(axis=0), other_squares.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # One norm after the other: the product of two tiny ones would underflow.
        x, a, b = inner / np.sqrt(g) / np.sqrt(h), squares / g, other_squares / h
    cosine = x.sum(axis=0).clip(-1, 1)
    spread = ((x - cosine * a) ** 2 + (x - cosine * b) ** 2) / 2
    variance = spread + (a - cosine * x) * (b - cosine * x)
    return cosine, np.maximum(variance.sum(axis=0), 0)


def _sketched(ours: Gradients, theirs: Gradients) -> _Products:
    a, b = (run.sketch(source).swapaxes(0, 1) for run, source in (ours, theirs))
    run, other = ours[0], theirs[0]
    made = run.contents.sketch
    if made is None or made != other.contents.sketch:
        raise ValueError(
            f"`other` should be sketched as `{run.path}` is, by {made}. Found "
            f"{other.contents.sketch} in `{other.path}`. Record both with the same Sketch."
        )
    _check_same(run.layers, other.layers, other)
    return _Products(
        run.layers,
        run.steps,
        other.steps,
        inner=np.stack([*map(sketch.inner, a, b)]),
        squares=np.square(a, dtype=np.float64).sum(axis=-1),
        other_squares=np.square(b, dtype=np.float64).sum(axis=-1),
        per_width=1 / made.width,
    )


def _stored(ours: Gradients, theirs: Gradients) -> _Products:
    (run, source), (other, other_source) = ours, theirs
    (parameters, error), (others, other_error) = _kept(run), _kept(other)
    _check_same(parameters, others, other)
    squares, other_squares = _squares(run, source), _squares(other, other_source)
    steps, other_steps = run.stored_steps, other.stored_steps
    inner = np.full((len(squares), len(steps), len(other_steps)), np.nan)
    mirrored = run is other and source == other_source
    # Two gradients at a time: more might not fit.
    for i in _present(squares):
        vectors = run.gradient(source, steps[i])
        for j in _present(other_squares):
            if mirrored and j < i:
                inner[:, i, j] = inner[:, j, i]
            else:
                inner[:, i, j] = [*map(_dot, vectors, other.gradient(other_source, other_steps[j]))]
    return _Products(
        parameters,
        steps,
        other_steps,
        inner,
        squares,
        other_squares,
        rounding=float(np.sqrt((error**2 + other_error**2) / 2)),
    )


def _kept(run: Run) -> tuple[list[Parameter], float]:
    """The parameters whose gradients were stored, and the error of their encoding."""
    stored = run.contents.gradients
    assert stored
    return [run.layers[i] for i in stored.parameters], ENCODINGS[stored.encoding].error


def _squares(run: Run, source: str) -> Floats:
    """The squared norms (layer, step) of stored gradients before they were encoded."""
    stored = run.contents.gradients
    assert stored
    i = run.index(source)
    at = np.array([np.flatnonzero(run.steps == step)[-1] for step in run.stored_steps], dtype=int)
    parts: dict[str, list[int]] = {}
    for parameter in stored.parameters:
        parts.setdefault(run.layers[parameter].layer, []).append(parameter)
    exact = run.gram()[at, :, i, i]
    squares = np.stack([exact[:, members].sum(axis=1) for members in parts.values()])
    # The mean of several batches is not as long as those are.
    for t in set(np.flatnonzero(run.rows[at] > 1)) & set(_present(squares)):
        vectors = run.gradient(source, run.stored_steps[t])
        squares[:, t] = [*map(_dot, vectors, vectors)]
    return squares


def _present(squares: Floats) -> NDArray[np.int64]:
    """The steps that have a gradient."""
    return np.flatnonzero(~np.isnan(squares).all(axis=0))


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """<a, b> with a sum that does not round, block by block."""
    parts = [slice(start, start + _AT_ONCE) for start in range(0, len(a), _AT_ONCE)]
    return float(sum(np.dot(a[p].astype(np.float64), b[p].astype(np.float64)) for p in parts))


def _check_same(parameters: Sequence[Parameter], others: Sequence[Parameter], other: Run) -> None:
    """Refuse gradients of two models."""
    here, there = ([(p.name, p.layer, p.shape) for p in those] for those in (parameters, others))
    if here != there:
        differing = sorted({name for name, _, _ in set(here) ^ set(there)}) or ["their order"]
        raise ValueError(
            "`other` should hold gradients of the same parameters. Found "
            f"{len(differing)} that differ in `{other.path}`, among them {differing[:3]}. Compare "
            "runs of one model."
        )
