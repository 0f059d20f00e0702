"""Whether the applied update breaks the constraint that a rectifier keeps."""

import numpy as np
import pandas as pd

from geffect.gram import cosine, norm
from geffect.groups import By
from geffect.scores import YES_OR_NO, Score, beside, stack, tidy
from geffect.sources import RETAIN, UPDATE, average_of
from geffect.store import Run

from .base import Floats, block_sums, check_run, column_of, in_space, parts_of, summed_gram
from .rectified import default_by, level_told, protected

ROUNDING = 1e-6
"""By how much the rounding of the averages, which are float32, turns a product, as a cosine."""

SCORE = Score("violation of the constraint by the applied update", YES_OR_NO)


def violation(run: Run, by: By | None = None) -> pd.DataFrame:
    """1 where the applied update raises, to first order, what the retain average protects; else 0.

    That is <theta_after - theta_before, r> > 0 beyond rounding, with r the rectifier's running
    average of the retain gradient. Parameters are rounded when they are stepped: a coordinate of
    the update may be off by eps |theta|, which at a learning rate of 1e-5 is more than what a
    constraint leaves of the product. So a violation counts above a cosine of

        tolerance = 1e-6 + eps sum_p |theta_p| |r_p| / (|update| |r|)

    over the parameters p of a block, with eps = 2^-23 (2^-52 for float64). NaN where nothing moved,
    and where the tolerance reaches 1: then the update is rounding, and nothing can be told. The
    rounding of half precision is no excuse: it loses corrections whole, so eps is 2^-23 there too.
    A file that has no lengths of parameters, as those of an earlier geffect, has 1e-6 alone.

    Blocks are those that the rectifier constrains: an update may harm single layers and keep a
    constraint on the model. Of other blocks, which `by` names, a column `level` says so. Where each
    coordinate is constrained, blocks are parameters; the model, where nothing is.

    Columns: step, `by`, (level, against,) value, tolerance, score, unit. `against` names the retain
    set where there are several. The mean of `value` is the rate of violating steps. Needs a run
    recorded with Recorder(..., update=True) and a rectifier, which may be one that only watches
    (rule=None).

    >>> run = example_run(update=True)
    >>> violation(run)[["step", "model", "value", "tolerance"]]
       step  model  value  tolerance
    0     0  model    1.0   0.000001
    """
    check_run(run)
    by = default_by(run, "model") if by is None else by
    blocks, K = summed_gram(run, by)
    update = run.index(UPDATE)
    tables = {}
    for against in protected(run) or [RETAIN]:
        average = run.index(average_of(against))
        lengths = norm(K, update) * norm(K, average)
        allowed = tolerance(lengths, rounding(run, by, against))
        table = tidy(
            violates(cosine(K, update, average), allowed),
            in_space(run, SCORE),
            steps=run.steps,
            blocks=blocks,
            by=column_of(by),
            **level_told(run, by),
        )
        table = beside(table, "tolerance", allowed.reshape(-1))
        tables[against] = table
    return stack(tables, "against") if len(tables) > 1 else table


def violates(harm: Floats, allowed: Floats) -> Floats:
    """1 where a cosine is above what is allowed, NaN where that cannot be told."""
    unknown = np.isnan(harm) | (allowed >= 1)
    return np.where(unknown, np.nan, harm > allowed)


def tolerance(lengths: Floats, rounded: Floats) -> Floats:
    """The cosine up to which rounding may account for a product of vectors of these lengths."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return ROUNDING + rounded / lengths


def rounding(run: Run, by: By, against: str) -> Floats:
    """By how much the rounding of parameters may change <update, r>: an array (step, block)."""
    of, labels, gram = parts_of(run, by)
    eps = np.array([2.0 ** (-52 if p.dtype == "float64" else -23) for p in run.layers])
    bounds = (eps * run.lengths())[:, of] * norm(gram, run.index(average_of(against)))
    return block_sums(run, (of, labels), np.nan_to_num(bounds))[1]
