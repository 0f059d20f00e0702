"""The noise floor: what cosine two gradients have that are noise alone."""

from dataclasses import replace

import numpy as np
import pandas as pd

from geffect.gram import cosine as cosine_of
from geffect.gram import inner, norm
from geffect.groups import By
from geffect.scores import beside, tidy
from geffect.sources import OBJECTIVE, RETAIN
from geffect.store import Run

from .base import Floats, block_sums, check_run, column_of, parts_of, summed_gram
from .cosine import score_of_cosine


def noise_floor(
    run: Run,
    a: str = OBJECTIVE,
    b: str = RETAIN,
    by: By = "layer",
    *,
    level: float = 0.95,
    stepped_only: bool = True,
) -> pd.DataFrame:
    """The cosine of two sources with `floor`, the |cosine| that noise alone stays below.

    By chance: in every tensor both gradients keep the length that they have and point anywhere,
    each for itself, as the noise of two batches that share nothing does. The cosine in a tensor of
    n numbers then has the mean 0 and the variance 1 / n, and that of a block has

        variance = sum_p |a_p|^2 |b_p|^2 / n_p / (|a|^2 |b|^2)        floor = z sqrt(variance)

    with z the quantile of the standard normal distribution, 1.96 at the level 0.95, and 1 at most.
    The noise of real batches lies in fewer directions than n, so that this is the least there is.

    By batches: of a step that was measured on m batches, as by `geffect.replay`, each has its own
    inner product, and their mean is as far from that of endless data as their spread says:

        floor = t sqrt(var_i <a_i, b_i> / m) / (|a| |b|)

    with t the quantile of Student's t with m - 1 degrees of freedom. The larger of the two is the
    floor. A cosine inside of it is no conflict; of one batch a step, one outside may be noise.

    Columns: step, `by`, value, floor, rows (the batches of the step), score, unit. NaN where the
    cosine is. Raises a ValueError for a level outside of 0 to 1.

    >>> noise_floor(example_run(), "forget", "retain")[["step", "layer", "value", "floor"]]
       step    layer  value     floor
    0     0  layer 0    0.5  0.979982
    """
    if not 0 < level < 1:
        raise ValueError(
            f"`level` should be between 0 and 1. Found {level}. Pass, say, level=0.95."
        )
    check_run(run)
    from scipy.special import ndtri  # takes long to load

    i, j = run.index(a), run.index(b)
    of, labels, gram = parts_of(run, by)
    if stepped_only:
        gram = np.where(run.stepped()[:, of][..., np.newaxis, np.newaxis], gram, 0.0)
    numbers = np.array([run.layers[i].numel for i in of]) / np.bincount(of)[of]
    blocks, K = block_sums(run, (of, labels), gram)
    _, both = block_sums(run, (of, labels), inner(gram, i, i) * inner(gram, j, j) / numbers)
    with np.errstate(invalid="ignore", divide="ignore"):
        # One length after the other: the product of two tiny ones would underflow.
        # Of an estimate a squared length may be negative: its cosine is NaN, and so is its floor.
        lengths = norm(K, i), norm(K, j)
        chance = ndtri((1 + level) / 2) * np.sqrt(both) / lengths[0] / lengths[1]
        measured = _spread(run, a, b, by, level, stepped_only) / lengths[0] / lengths[1]
    value = cosine_of(K, i, j)
    floor = np.minimum(1.0, np.fmax(chance, measured))
    floor[np.isnan(value)] = np.nan
    table = tidy(
        value, score_of_cosine(run, a, b), steps=run.steps, blocks=blocks, by=column_of(by)
    )
    table = beside(table, "rows", np.repeat(run.rows, len(blocks)))
    return beside(table, "floor", floor.reshape(-1))


def _spread(run: Run, a: str, b: str, by: By, level: float, stepped_only: bool) -> Floats:
    """How far from zero noise alone takes the mean inner product of the batches of each step, an
    array (step, block); NaN for a step of one batch."""
    from scipy.special import stdtrit  # takes long to load

    spread = np.full((len(run.steps), 1), np.nan)
    if (run.rows == 1).all():
        return spread
    each = replace(run, steps=np.arange(len(run.drawn)), rows=np.ones_like(run.drawn))
    _, K = summed_gram(each, by, stepped_only=stepped_only)
    products = np.split(inner(K, run.index(a), run.index(b)), np.cumsum(run.rows)[:-1])
    return np.stack(
        [
            own.std(axis=0, ddof=1) * stdtrit(len(own) - 1, (1 + level) / 2) / np.sqrt(len(own))
            if len(own) > 1
            else np.full(own.shape[1:], np.nan)
            for own in products
        ]
    )
