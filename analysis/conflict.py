"""Gradient conflict: where following one gradient raises what the other lowers."""

import numpy as np
import pandas as pd

from geffect.gram import in_conflict, norm
from geffect.scores import Score, tidy
from geffect.sources import OBJECTIVE, RETAIN
from geffect.store import Run

from .base import By, column_of, in_space, summed_gram


def conflict(
    run: Run,
    a: str = OBJECTIVE,
    b: str = RETAIN,
    by: By = "layer",
    *,
    stepped_only: bool = True,
) -> pd.DataFrame:
    """1 where <g_a, g_b> < 0, 0 where not, NaN where a gradient is zero or absent.

    Columns: step, `by`, value. The mean of `value` over steps, blocks or both is the conflict rate.
    Over the parameters that the step moves, NaN for a block that it does not move, or over all
    with `stepped_only=False`.

    >>> run = example_run()
    >>> conflict(run, by="model")
       step  model  value
    0     0  model    1.0
    """
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    i, j = run.index(a), run.index(b)
    comparable = (norm(K, i) > 0) & (norm(K, j) > 0)
    values = np.where(comparable, in_conflict(K, i, j), np.nan)
    score = Score("conflict", f"conflict of {a} and {b}", limits=(0.0, 1.0))
    return tidy(values, in_space(run, score), steps=run.steps, blocks=blocks, by=column_of(by))
