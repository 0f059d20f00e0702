"""The accumulated change of each risk: as the updates predict it, and as it was measured."""

import numpy as np
import pandas as pd

from geffect.gram import inner
from geffect.groups import By
from geffect.scores import PER_TOKEN, Score, stack, tidy
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
    apart = np.diff(run.steps)
    if (apart <= 0).any():
        raise ValueError(
            f"`run` should be one training, whose steps follow each other. Found `{run.path}`, "
            "where they begin anew. Accumulate a run of one request."
        )
    blocks, K = summed_gram(run, by)
    update, losses = run.index(UPDATE), run.losses()
    skipped = run.column("skipped").astype(bool)[:, np.newaxis]
    tables = {}
    for risk in risks_of(run):
        rises = np.where(skipped, 0.0, inner(K, run.index(risk), update))
        predicted = np.zeros_like(rises)
        predicted[1:] = np.cumsum(rises[:-1] * apart[:, np.newaxis], axis=0)
        values, gap = {PREDICTED: predicted}, np.full_like(predicted, np.nan)
        if by == "model":
            loss = losses.get(risk, np.full(len(rises), np.nan))[:, np.newaxis]
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
    table.insert(list(table).index("value") + 1, "gap", table.pop("gap"))
    return table


def _gap(predicted: Floats, measured: Floats) -> Floats:
    return np.abs(predicted - measured) / np.where(measured == 0, np.nan, np.abs(measured))
