"""The predicted change: what the update that the optimizer applied does to each risk."""

import pandas as pd

from geffect.gram import inner
from geffect.groups import By
from geffect.scores import PER_TOKEN, Score, stack, tidy
from geffect.sources import UPDATE
from geffect.store import Run

from .base import check_run, column_of, in_space, risks_of, summed_gram

SCORE = Score("predicted fall of the risk", PER_TOKEN)


def predicted_change(run: Run, by: By = "layer") -> pd.DataFrame:
    """-<grad R(theta), theta_after - theta_before>, for every risk of the run.

    To first order, by how much the risk falls in this step: positive means that it falls. For plain
    gradient descent this is the learning rate times the G-effect. After Adam, clipping, momentum or
    a rectifier only this describes what happened. Negative for the retain risk is harm done.

    Columns: step, `by`, risk, value, score, unit. Needs a run recorded with Recorder(...,
    update=True).

    >>> run = example_run(update=True)
    >>> predicted_change(run, by="model").drop(columns=["score", "unit"])
       step  model    risk  value
    0     0  model  forget   -0.4
    1     0  model  retain   -0.1
    """
    check_run(run)
    update = run.index(UPDATE)
    blocks, K = summed_gram(run, by)
    tables = {
        risk: tidy(
            0.0 - inner(K, run.index(risk), update),  # no minus zero
            in_space(run, SCORE),
            steps=run.steps,
            blocks=blocks,
            by=column_of(by),
        )
        for risk in risks_of(run)
    }
    return stack(tables, "risk")
