"""Implicit weights: how an objective spread its gradient over the forget data, step by step."""

import pandas as pd

from geffect.scores import WEIGHT, Score, stack, tidy
from geffect.store import Run

from .base import check_run

SCORE = Score("implicit weight", WEIGHT)


def implicit_weights(run: Run) -> pd.DataFrame:
    """Statistics of the weights w of an objective whose gradient is E[w grad log p].

    "weight" is w of every answer token, or of every sample where the objective weighs whole
    answers: p^alpha for WGA, 2 p^beta / (p^beta + p_o^beta) for NPO and TNPO, where p_o is the
    probability before unlearning (arXiv 2502.19301). "inverse confidence" is 1/p of every answer
    token, the factor from a gradient of p to one of log p: it explodes on what is forgotten.

    Columns: step, model, statistic ("mean" | "median" | "p95" | "max"), weight, value, score,
    unit. Raises a ValueError for a run that was recorded without weights.

    >>> implicit_weights(example_run(weights=True)).drop(columns=["score", "unit"])
       step  model statistic weight  value
    0     0  model      mean    npo    1.0
    1     0  model    median    npo    1.5
    2     0  model       p95    npo    1.9
    3     0  model       max    npo    2.0
    """
    check_run(run)
    return stack(
        {
            weight: stack(
                {
                    name: tidy(
                        values[:, None], SCORE, steps=run.steps, blocks=["model"], by="model"
                    )
                    for name, values in statistics.items()
                },
                "statistic",
            )
            for weight, statistics in run.weights().items()
        },
        "weight",
    )
