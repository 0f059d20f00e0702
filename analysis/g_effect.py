"""The G-effect: what a step along the unlearning gradient does to what the model knows."""

import pandas as pd

from geffect.gram import inner
from geffect.groups import By
from geffect.scores import PER_RATE, PER_TOKEN, Score, stack, tidy
from geffect.sources import FORGET, OBJECTIVE, RECTIFIED, RETAIN, UPDATE
from geffect.store import Run

from .base import check_run, column_of, in_space, summed_gram
from .rectified import acts, at_copy

EFFECTS = {"unlearning": FORGET, "retaining": RETAIN}
"""The risk whose gradient is compared with that of the objective."""

SCORE = Score("G-effect", PER_RATE)
BEFORE = Score("G-effect before rectification", PER_RATE)
AFTER = {
    RECTIFIED: (Score("G-effect of the rectified gradient", PER_RATE), 1.0),
    UPDATE: (Score("G-effect of the applied update", PER_TOKEN), -1.0),
}
"""What is shown of a rectified run beside the objective. An update is a step and no gradient."""


def g_effect(run: Run, by: By = "layer", *, stepped_only: bool = True) -> pd.DataFrame:
    """e(D) = <grad R(D), grad L_u>, not normalised, no learning rate inside (arXiv 2502.19301).

    R is the risk (NLL) on the data D, L_u the objective as it is minimised, both gradients at the
    same parameters. One small step of gradient descent changes the risk by -(learning rate) e(D):

    - unlearning, D = forget: negative is good, the forget risk rises; positive re-learns.
    - retaining, D = retain: zero or positive is good; negative is collateral damage.

    Where a rectifier changed the steps, these two are of the gradient before rectification, and
    `score` says so. Beside them come those of what was made of it, where the run has it:

    Where the objective was taken at a relearned copy (`geffect.Relearned`), `score` says that too:
    the risks are those at theta.

    - unlearning, rectified and retaining, rectified: of the gradient after the rectifier.
    - unlearning, update and retaining, update: -<grad R(D), theta after minus theta before>, by
      how much the applied update lowers the risk to first order, in nats per token.

    Columns: step, `by`, effect, value, score, unit. Blocks add up to the model.
    Where forget risk and objective come from one batch, the unlearning effect carries the variance
    of that batch. Magnitudes of objectives with different reductions do not compare: see `cosine`.
    Raises a ValueError for a run without the objective, or without both risks.

    - `stepped_only`: sum over the parameters that the step moves, as the sentence on a step of
      gradient descent needs; a block that it does not move is NaN. False: over all.

    >>> run = example_run()
    >>> g_effect(run, by="model").drop(columns=["score", "unit"])
       step  model      effect  value
    0     0  model  unlearning   -4.0
    1     0  model   retaining   -1.0
    >>> rectified = g_effect(example_run(rectified=True), by="model")
    >>> rectified[["effect", "value", "score"]]
                   effect  value                           score
    0          unlearning   -4.0   G-effect before rectification
    1           retaining   -1.0   G-effect before rectification
    2  unlearning, update   -0.3  G-effect of the applied update
    3   retaining, update    0.0  G-effect of the applied update
    """
    check_run(run)
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    shown = {OBJECTIVE: (BEFORE if acts(run) else SCORE, 1.0)}
    if acts(run):
        shown |= {source: how for source, how in AFTER.items() if source in run.sources}
    shown = {source: (at_copy(run, source, score), sign) for source, (score, sign) in shown.items()}
    tables = {
        effect if source == OBJECTIVE else f"{effect}, {source}": tidy(
            sign * inner(K, run.index(risk), run.index(source)) + 0.0,  # no zero with a sign
            in_space(run, score),
            steps=run.steps,
            blocks=blocks,
            by=column_of(by),
        )
        for source, (score, sign) in shown.items()
        for effect, risk in EFFECTS.items()
    }
    return stack(tables, "effect")
