"""The accumulated change of each risk: as the updates predict it, and as it was measured."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from geffect.gram import inner
from geffect.groups import By
from geffect.scores import PER_TOKEN, Score, beside, stack, tidy
from geffect.sources import UPDATE
from geffect.store import Run

from .base import Floats, check_run, column_of, in_space, risks_of, summed_gram

SCORE = Score("rise of the risk", PER_TOKEN)

PREDICTED, MEASURED = "predicted", "measured"


def accumulated(run: Run, by: By = "model") -> pd.DataFrame:
    """By how much each risk has risen since the first step of the run, twice.

    With the updates D as the optimizer made them,

        predicted(t) = sum_{s < t} <grad R(theta_s), D_s>      measured(t) = R(theta_t) - R(theta_0)

    To first order they are equal: how far they are apart is the check of every first-order score.
    R is the loss of the step's own batch, so that small batches make `measured` rough. Where a run
    has captured some steps only, each stands for those up to the next, and `predicted` is an
    estimate. A step that the optimizer skipped counts 0.

    Of smaller blocks than the model, which add up to it, `predicted` alone is there.

    Columns: step, `by`, risk, how ("predicted" or "measured"), value, gap, score, unit. `gap` is
    |predicted - measured| / |measured|, NaN where nothing was measured. Needs a run recorded with
    Recorder(..., update=True). Raises a ValueError for a run whose steps begin anew.

    >>> table = accumulated(example_run(update=True, steps=3))
    >>> table.query("how == 'predicted' and risk == 'forget'")[["step", "value"]]
       step  value
    0     0    0.0
    1     1    0.4
    2     2    0.8
    """
    check_run(run)
    before = before_steps(run, run.steps)
    blocks, K = summed_gram(run, by)
    update, losses = run.index(UPDATE), run.losses()
    tables = {}
    for risk in risks_of(run):
        predicted = summed_before(run, before, inner(K, run.index(risk), update))
        values, gap = {PREDICTED: predicted}, np.full_like(predicted, np.nan)
        if by == "model":
            loss = losses.get(risk, np.full(len(predicted), np.nan))[:, np.newaxis]
            values[MEASURED] = loss - loss[:1]
            gap = _gap(predicted, values[MEASURED])
        tables[risk] = stack(
            {
                how: tidy(
                    of,
                    in_space(run, SCORE),
                    steps=run.steps,
                    blocks=blocks,
                    by=column_of(by),
                ).assign(gap=gap.reshape(-1))
                for how, of in values.items()
            },
            "how",
        )
    table = stack(tables, "risk")
    return beside(table, "gap", table["gap"])


def before_steps(run: Run, steps: Iterable[int]) -> Floats:
    """How many of the updates before each step each row of the run stands for, (step, row).

    Step N is the model after N updates. A row that was captured stands for those up to the next.
    Raises a ValueError for a run that begins anew, and for steps outside of it.
    """
    own = run.steps.astype(np.float64)
    if not len(own):
        raise ValueError(
            f"`run` should have a step. Found none in `{run.path}`. Record a training first."
        )
    apart = np.diff(own)
    if (apart <= 0).any():
        raise ValueError(
            f"`run` should be one training, whose steps follow each other. Found `{run.path}`, "
            "where they begin anew. Take a run of one request."
        )
    ends = np.append(own[1:], own[-1] + (float(np.median(apart)) if len(apart) else 1.0))
    wanted = np.array([*steps], dtype=np.float64)
    outside = wanted[(wanted < own[0]) | (wanted > ends[-1])]
    if len(outside):
        raise ValueError(
            f"A checkpoint should be one of the run, from {own[0]:g} to {ends[-1]:g} updates. "
            f"Found {outside[0]:g}. Leave it out, or name the run that it is of."
        )
    counts: Floats = np.clip(np.minimum(ends, wanted[:, np.newaxis]) - own, 0.0, None)
    return counts


def summed_before(run: Run, before: Floats, changes: Floats) -> Floats:
    """The changes (row, block) of all updates before each step, by `before_steps`: (step, block).

    A step that the optimizer skipped counts 0. What is not known makes unknown what comes after.
    """
    skipped = run.column("skipped").astype(bool)[:, np.newaxis]
    known = np.where(skipped, 0.0, changes)
    missing = ~np.isfinite(known)
    sums: Floats = before @ np.where(missing, 0.0, known)
    sums[(before > 0).astype(np.float64) @ missing > 0] = np.nan
    return sums


def _gap(predicted: Floats, measured: Floats) -> Floats:
    return np.abs(predicted - measured) / np.where(measured == 0, np.nan, np.abs(measured))
