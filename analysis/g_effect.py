"""The G-effect: what a step along the unlearning gradient does to what the model knows."""

import pandas as pd

from geffect.gram import inner
from geffect.scores import Score, stack, tidy
from geffect.sources import FORGET, OBJECTIVE, RETAIN
from geffect.store import Run

from .base import By, column_of, in_space, summed_gram

EFFECTS = {"unlearning": FORGET, "retaining": RETAIN}
"""The risk whose gradient is compared with that of the objective."""

SCORE = Score("g_effect", "G-effect (nats per unit learning rate)", scale="symlog")


def g_effect(run: Run, by: By = "layer", *, stepped_only: bool = True) -> pd.DataFrame:
    """e(D) = <grad R(D), grad L_u>, not normalised, no learning rate inside (arXiv 2502.19301).

    R is the risk (NLL) on the data D, L_u the objective as it is minimised, both gradients at the
    same parameters. One small step of gradient descent changes the risk by -(learning rate) e(D):

    - unlearning, D = forget: negative is good, the forget risk rises; positive re-learns.
    - retaining, D = retain: zero or positive is good; negative is collateral damage.

    Columns: step, `by`, effect ("unlearning" | "retaining"), value. Blocks add up to the model.
    Where forget risk and objective come from one batch, the unlearning effect carries the variance
    of that batch. Magnitudes of objectives with different reductions do not compare: see `cosine`.
    Raises a ValueError for a run without the objective, or without both risks.

    - `stepped_only`: sum over the parameters that the step moves, as the sentence on a step of
      gradient descent needs; a block that it does not move is NaN. False: over all.

    >>> run = example_run()
    >>> g_effect(run, by="model")
       step  model      effect  value
    0     0  model  unlearning   -4.0
    1     0  model   retaining   -1.0
    """
    blocks, K = summed_gram(run, by, stepped_only=stepped_only)
    objective = run.index(OBJECTIVE)
    tables = {
        effect: tidy(
            inner(K, run.index(risk), objective),
            in_space(run, SCORE),
            steps=run.steps,
            blocks=blocks,
            by=column_of(by),
        )
        for effect, risk in EFFECTS.items()
    }
    return stack(tables, "effect")
