"""What TOFU and its kin report of a whole model: forget quality and model utility."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ForgetQuality:
    """How far truth ratios of an unlearned model are from those of a retrained one.

    - `distance`: the largest distance D of the two distribution functions, 0 to 1.
    - `sign`: 1 where the values of the unlearned model are larger there, -1 where smaller, 0 where
      they are as far apart in both directions.
    - `p`: the probability of such a distance between samples of one distribution. It depends on how
      many items there are: compare it only at equal `n`.
    - `n`: how many values each has that are not NaN, unlearned and retrained.
    """

    distance: float
    sign: int
    p: float
    n: tuple[int, int]


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> ForgetQuality:
    """The two-sample test of Kolmogorov and Smirnov on truth ratios (TOFU, arXiv 2401.06121).

    - `unlearned`, `retrained`: ratios of one definition, an item each. r and 1/r give the same but
      for the sign.

    A low p says that they differ, the sign in which direction.

    >>> forget_quality([0.2, 0.3, 0.35, 0.5, 0.8], [0.55, 0.6, 0.7, 0.75, 0.9])
    ForgetQuality(distance=0.8, sign=-1, p=0.079365..., n=(5, 5))
    """
    from scipy import stats  # takes long to load

    samples = [np.asarray(values, dtype=np.float64).ravel() for values in (unlearned, retrained)]
    first, second = (values[~np.isnan(values)] for values in samples)
    if not len(first) or not len(second):
        raise ValueError(
            "`unlearned` and `retrained` should be values of some items. Found "
            f"{len(first)} and {len(second)} that are numbers. Without a retrained model there is "
            "no forget quality."
        )
    found = stats.ks_2samp(first, second)
    n, m = len(first), len(second)
    each = np.concatenate([first, second])
    below, others = (np.searchsorted(np.sort(x), each, side="right") for x in (first, second))
    apart = below * m - others * n  # n m times how far the distribution functions are, exactly
    sign = -int(np.sign(apart.max() + apart.min()))
    return ForgetQuality(float(found.statistic), sign, float(found.pvalue), (n, m))


def harmonic_mean(values: Iterable[float]) -> float:
    """n / sum(1/v) of numbers from 0 on: 0 where one is 0, NaN where one is.

    >>> round(harmonic_mean([0.9, 0.8, 0.5]), 6), harmonic_mean([0.9, 0.0])
    (0.687898, 0.0)
    """
    given = np.asarray(list(values), dtype=np.float64)
    if not len(given) or (given < 0).any():
        raise ValueError(
            "A harmonic mean should be of numbers from 0 on, one or more. Found "
            f"{given.tolist()}. Leave out what is none."
        )
    with np.errstate(divide="ignore"):
        return float(len(given) / (1.0 / given).sum())


PARTS = ("prob", "rouge", "truth_ratio")


def model_utility(sets: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """The harmonic mean of three metrics on each of some sets, below the metrics themselves.

    - `sets`: for each set, in TOFU retain, real authors and world, the means over its items of
      `prob`, `rouge` (the recall of ROUGE-L) and `truth_ratio` (`true_better` of the ratios). In
      TOFU `prob` of the last two sets is `prob_options`.

    Columns: set, metric, value; the last row is the mean, `model_utility` of the set `all`.

    >>> model_utility({"retain": {"prob": 0.9, "rouge": 0.8, "truth_ratio": 0.5}}).round(4)
          set         metric   value
    0  retain           prob  0.9000
    1  retain          rouge  0.8000
    2  retain    truth_ratio  0.5000
    3     all  model_utility  0.6879
    """
    for name, metrics in sets.items():
        if metrics.keys() != {*PARTS}:
            raise ValueError(
                f"The set `{name}` should have {', '.join(PARTS)}. Found "
                f"{', '.join(metrics) or 'nothing'}. Give the mean of each over its items."
            )
    rows = [(name, part, metrics[part]) for name, metrics in sets.items() for part in PARTS]
    mean = harmonic_mean(value for *_, value in rows)
    return pd.DataFrame([*rows, ("all", "model_utility", mean)], columns=["set", "metric", "value"])
