"""The noise floor: what cosine two gradients have that are noise alone."""

import numpy as np
import pandas as pd

from geffect.groups import By
from geffect.scores import beside
from geffect.sources import OBJECTIVE, RETAIN
from geffect.store import Run

from .base import block_sums, check_run, parts_of
from .cosine import cosine


def noise_floor(
    run: Run,
    a: str = OBJECTIVE,
    b: str = RETAIN,
    by: By = "layer",
    *,
    level: float = 0.95,
    stepped_only: bool = True,
) -> pd.DataFrame:
    """The cosine of two sources with `floor`, the |cosine| that chance alone stays below.

    By chance: in every tensor both gradients keep the length that they have and point anywhere,
    each for itself, as the noise of two batches that share nothing does. The cosine in a tensor of
    n numbers then has the mean 0 and the variance 1 / n, and that of a block has

        variance = sum_p |a_p|^2 |b_p|^2 / n_p / (|a|^2 |b|^2)        floor = z sqrt(variance)

    with z the quantile of the standard normal distribution, 1.96 at the level 0.95, and 1 at most.
    A cosine inside of the floor is no conflict. The noise of real batches lies in fewer directions
    than n, so that the floor is the least there is: one outside of it may still be noise. Of a run
    with several batches a step, `intervals` measures that.

    Columns: step, `by`, value, floor, score, unit. NaN where the cosine is. Raises a ValueError for
    a level outside of 0 to 1.

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

    table = cosine(run, a, b, by, stepped_only=stepped_only)
    of, labels, K = parts_of(run, by)
    if stepped_only:
        K[~run.stepped()[:, of]] = 0.0
    # Of an estimate a squared length may be negative: its cosine is NaN, and so is its floor.
    squares, others = (K[..., i, i] for i in map(run.index, (a, b)))
    numbers = np.array([run.layers[i].numel for i in of]) / np.bincount(of)[of]
    first, second, both = (
        block_sums(run, (of, labels), products)
        for products in (squares, others, squares * others / numbers)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        # One length after the other: the product of two tiny ones would underflow.
        spread = np.sqrt(both) / np.sqrt(first) / np.sqrt(second)
    floor = np.minimum(1.0, ndtri((1 + level) / 2) * spread).reshape(-1)
    floor[table["value"].isna()] = np.nan
    return beside(table, "floor", floor)
