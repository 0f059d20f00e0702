"""Angles: the cosine of every two gradients of a step, and how long each is."""

import pandas as pd

from geffect.gram import cosine, norm
from geffect.groups import By
from geffect.scores import COSINE, Score, beside, stack, tidy
from geffect.store import Run

from .base import check_run, column_of, in_space, summed_gram

SCORE = Score("cosine", COSINE)


def angles(run: Run, by: By = "model", *, stepped_only: bool = True) -> pd.DataFrame:
    """<g_a, g_b> / (|g_a| |g_b|) of every source of the run with every other, and with itself.

    Columns: step, `by`, other, source, value, length, score, unit. `length` is that of the gradient
    of `source`. NaN where a gradient is zero or absent. Sums are over the parameters that the step
    moves, as for `cosine`, which is one pair of these.

    >>> table = angles(example_run())
    >>> table.query("source == 'forget'")[["other", "value", "length"]]
           other  value  length
    3  objective   -1.0     2.0
    4     forget    1.0     2.0
    5     retain    0.5     2.0
    """
    check_run(run)
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    tables = {
        source: stack(
            {
                other: tidy(
                    cosine(K, i, j),
                    in_space(run, SCORE),
                    steps=run.steps,
                    blocks=blocks,
                    by=column_of(by),
                ).assign(length=norm(K, i).reshape(-1))
                for j, other in enumerate(run.sources)
            },
            "other",
        )
        for i, source in enumerate(run.sources)
    }
    table = stack(tables, "source")
    return beside(table, "length", table["length"])
