"""Gradient conflict: where following one gradient raises what the other lowers."""

import numpy as np
import pandas as pd

from geffect.gram import in_conflict, norm
from geffect.groups import By
from geffect.scores import YES_OR_NO, Score, tidy
from geffect.sources import OBJECTIVE, RETAIN
from geffect.store import Run

from .base import check_run, column_of, in_space, summed_gram
from .rectified import default_by, level_told, named


def conflict(
    run: Run,
    a: str = OBJECTIVE,
    b: str = RETAIN,
    by: By | None = None,
    *,
    stepped_only: bool = True,
) -> pd.DataFrame:
    """1 where <g_a, g_b> < 0, 0 where not, NaN where a gradient is zero or absent.

    Columns: step, `by`, (level,) value, score, unit. The mean of `value` over steps, blocks or both
    is the conflict rate. Blocks are those that the rectifier of the run constrains, as for
    `violation`; layers where nothing is constrained. A column `level` says where others are asked
    for. Where a rectifier changed the steps, the objective is the gradient before it. Over the
    parameters that the step moves, NaN for a block that it does not move, or over all with
    `stepped_only=False`.

    >>> conflict(example_run())
       step    layer  value                              score    unit
    0     0  layer 0    1.0  conflict of objective and retain  0 or 1
    """
    check_run(run)
    by = default_by(run, "layer") if by is None else by
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    i, j = run.index(a), run.index(b)
    comparable = (norm(K, i) > 0) & (norm(K, j) > 0)
    values = np.where(comparable, in_conflict(K, i, j), np.nan)
    score = Score(f"conflict of {named(run, a)} and {named(run, b)}", YES_OR_NO)
    return tidy(
        values,
        in_space(run, score),
        steps=run.steps,
        blocks=blocks,
        by=column_of(by),
        **level_told(run, by),
    )
