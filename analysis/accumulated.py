"""The accumulated change of each risk: as the updates predict it, and as it was measured."""

import numpy as np
import pandas as pd

from geffect.scores import PER_TOKEN, Score, stack, tidy
from geffect.store import Run

from .base import Floats, check_run, in_space, risks_of
from .predicted_change import predicted_change

SCORE = Score("rise of the risk since the first step", PER_TOKEN)

PREDICTED, MEASURED = "predicted", "measured"


def accumulated(run: Run) -> pd.DataFrame:
    """By how much each risk has risen since the first step of the run, twice.

    With the updates D as the optimizer made them,

        predicted(t) = sum_{s < t} <grad R(theta_s), D_s>      measured(t) = R(theta_t) - R(theta_0)

    To first order they are equal: how far they are apart is the check of every first-order score.
    R is the loss of the step's own batch, so that small batches make `measured` rough. Where a run
    has captured some steps only, each stands for those up to the next, and `predicted` is an
    estimate. A step that the optimizer skipped counts 0.

    Columns: step, model, risk, how ("predicted" or "measured"), value, gap, score, unit. `gap` is
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
    falls, losses = predicted_change(run, by="model"), run.losses()
    tables = {}
    for risk in risks_of(run):
        fall = np.where(run.column("skipped"), 0.0, falls[falls["risk"] == risk]["value"])
        predicted = np.append(0.0, -np.cumsum(fall[:-1] * apart)) if len(fall) else fall
        loss = losses.get(risk, np.full(len(fall), np.nan))
        measured = loss - loss[:1]
        gap = _gap(predicted, measured)
        tables[risk] = stack(
            {
                how: tidy(
                    values[:, np.newaxis],
                    in_space(run, SCORE),
                    steps=run.steps,
                    blocks=["model"],
                    by="model",
                ).assign(gap=gap)
                for how, values in ((PREDICTED, predicted), (MEASURED, measured))
            },
            "how",
        )
    table = stack(tables, "risk")
    table.insert(list(table).index("value") + 1, "gap", table.pop("gap"))
    return table


def _gap(predicted: Floats, measured: Floats) -> Floats:
    return np.abs(predicted - measured) / np.where(measured == 0, np.nan, np.abs(measured))
