"""The inter-gradient cosine: how far the directions of two gradients disagree."""

import pandas as pd

from geffect.gram import cosine as cosine_of
from geffect.groups import By
from geffect.scores import COSINE, Score, tidy
from geffect.store import Run

from .base import check_run, column_of, in_space, summed_gram
from .rectified import named


def cosine(
    run: Run, a: str, b: str, by: By = "layer", *, stepped_only: bool = True
) -> pd.DataFrame:
    """<g_a, g_b> / (|g_a| |g_b|) of two sources, between -1 (opposed) and 1 (aligned).

    Columns: step, `by`, value, score, unit. The cosine of a block comes from its summed inner
    products and squared norms. It is not the mean of the cosines of its tensors. NaN where a
    gradient is zero, as that of an adapter's factor is at the start: it has no direction. The sums
    are over the parameters that the step moves, and NaN for a block that it does not move; with
    `stepped_only=False` over all. Where a rectifier changed the steps, the objective is the
    gradient before it, and `score` says so.

    >>> run = example_run()
    >>> cosine(run, "forget", "retain", by="model")
       step  model  value                        score    unit
    0     0  model    0.5  cosine of forget and retain  cosine
    """
    check_run(run)
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    values = cosine_of(K, run.index(a), run.index(b))
    score = score_of_cosine(run, a, b)
    return tidy(values, score, steps=run.steps, blocks=blocks, by=column_of(by))


def score_of_cosine(run: Run, a: str, b: str) -> Score:
    """What the cosine of two sources is called."""
    return in_space(run, Score(f"cosine of {named(run, a)} and {named(run, b)}", COSINE))
