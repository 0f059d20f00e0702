"""Whether the applied update breaks the constraint that a rectifier keeps."""

import numpy as np
import pandas as pd

from geffect.gram import cosine
from geffect.scores import Score, tidy
from geffect.sources import RETAIN_EMA, UPDATE
from geffect.store import Run

from .base import By, column_of, in_space, summed_gram

ROUNDING = 1e-6
"""An update held on the constraint leaves it by this much, as a cosine, in float32 parameters."""


def violation(run: Run, by: By = "model") -> pd.DataFrame:
    """1 where the applied update raises, to first order, what the retain average protects; else 0.

    That is <theta_after - theta_before, r> > 0 beyond rounding, with r the rectifier's running
    average of the retain gradient. NaN where nothing moved. Columns: step, `by`, value; the mean of
    `value` is the share of violating steps. Needs a run recorded with Recorder(..., update=True)
    and a rectifier, which may be one that only watches (rule=None).

    >>> run = example_run(update=True)
    >>> violation(run)
       step  model  value
    0     0  model    1.0
    """
    blocks, K = summed_gram(run, by)
    along = cosine(K, run.index(UPDATE), run.index(RETAIN_EMA))
    values = np.where(np.isnan(along), np.nan, along > ROUNDING)
    score = Score("violation", "constraint violated by the applied update", limits=(0.0, 1.0))
    return tidy(values, in_space(run, score), steps=run.steps, blocks=blocks, by=column_of(by))
