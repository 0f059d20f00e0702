"""The norm ratio: how much longer one gradient is than another, and what clipping left of it."""

import numpy as np
import pandas as pd

from geffect.gram import norm
from geffect.groups import By
from geffect.scores import Score, beside, tidy
from geffect.sources import OBJECTIVE, RETAIN
from geffect.store import Run

from .base import check_run, column_of, in_space, summed_gram
from .rectified import named


def norm_ratio(
    run: Run, a: str = OBJECTIVE, b: str = RETAIN, by: By = "model", *, stepped_only: bool = True
) -> pd.DataFrame:
    """|g_a| / |g_b| of two sources, NaN where one of them is zero or absent.

    Columns: step, `by`, value, clip_scale, score, unit. `clip_scale` is the factor by which
    clipping shortened the gradient of the step, 1 where it did not, NaN where that was not seen: a
    Trainer tells it, a loop of one's own does not. Sums are over the parameters that the step
    moves, as for `cosine`.

    >>> norm_ratio(example_run())[["step", "model", "value", "clip_scale"]]
       step  model  value  clip_scale
    0     0  model    2.0         1.0
    """
    check_run(run)
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    above, below = norm(K, run.index(a)), norm(K, run.index(b))
    with np.errstate(invalid="ignore"):  # of two infinite lengths
        values = np.where(above > 0, above, np.nan) / np.where(below > 0, below, np.nan)
    score = Score(f"length of {named(run, a)} over that of {b}")
    table = tidy(values, in_space(run, score), steps=run.steps, blocks=blocks, by=column_of(by))
    return beside(table, "clip_scale", np.repeat(run.column("clip_scale"), len(blocks)))
