"""How much of the answers a model has memorised, each metric a value an item of a token record.

All are higher where more is memorised, but `nll` and `entropy`, which are lower. What to aim at is
the value of a model that was trained without the items, not 0.
"""

import numpy as np
import pandas as pd
import torch

from .extraction import strengths
from .tokens import Floats, TokenTable


def nll(table: TokenTable) -> Floats:
    """-(1/n) sum_i log p_i over the n tokens of each answer, in nats per token."""
    return -table.mean("logprob")


def prob(table: TokenTable) -> Floats:
    """exp(-nll) of each answer: the geometric mean of the probabilities of its tokens."""
    return np.exp(table.mean("logprob"))


def exact_match(table: TokenTable) -> Floats:
    """EM: the share of the tokens of each answer that are the most likely ones behind the others.

    The answer before each token is given (teacher forcing).
    """
    return table.mean("right")


def strength(table: TokenTable) -> Floats:
    """ES = 1 - k/n of each answer, as `geffect.evaluation.extraction_strength`; NaN without one."""
    longest = max(int(table.lengths.max()), 1)
    right, answer = np.zeros((2, table.items, longest), dtype=np.bool_)
    rows = table.counted
    at = rows["item"].to_numpy(), rows.groupby("item").cumcount().to_numpy()
    right[at], answer[at] = rows["right"].to_numpy(), True
    return strengths(torch.from_numpy(right), torch.from_numpy(answer)).numpy()


def entropy(table: TokenTable) -> Floats:
    """-sum_v p_v log p_v, the mean over the tokens of each answer: 0 to ln V nats."""
    return table.mean("entropy")


def el2n(table: TokenTable) -> Floats:
    """|p - onehot|, the mean over the tokens of each answer: 0 where it is certain, up to sqrt 2.

    From arXiv 2107.07075.
    """
    return table.mean("el2n")


METRICS = {
    "nll": nll,
    "prob": prob,
    "em": exact_match,
    "es": strength,
    "entropy": entropy,
}
"""The metrics of `memorised` by name."""


def memorised(table: TokenTable) -> pd.DataFrame:
    """All metrics of each item: columns item, subject, metric, value.

    `metric` is one of nll, prob, em, es and entropy. NaN for an item without a counted token.

    >>> import pandas as pd
    >>> told = {"item": [0, 0], "is_end": False, "logprob": np.log([0.5, 0.25]), "entropy": 1.0}
    >>> table = TokenTable(pd.DataFrame({**told, "right": [False, True]}), ("Ada",), vocabulary=4)
    >>> memorised(table).round(3)
       item subject   metric  value
    0     0     Ada      nll  1.040
    1     0     Ada     prob  0.354
    2     0     Ada       em  0.500
    3     0     Ada       es  0.500
    4     0     Ada  entropy  1.000
    """
    return table.tidy({name: metric(table) for name, metric in METRICS.items()})


def in_band(values: Floats, below: float, above: float) -> np.ndarray:
    """Which values lie between mean - `below` sd and mean + `above` sd, `Bool[item]`.

    A filter of items that are neither easy nor hard, of ConMU by EL2N with 0.3 to 0.5. The mean and
    the standard deviation are of the values that are not NaN.

    >>> in_band(np.array([0.0, 1.0, 2.0]), 0.5, 0.5).tolist()
    [False, True, False]
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.zeros(values.shape, dtype=np.bool_)
    apart = (values - known.mean()) / (known.std() or 1.0)
    inside: np.ndarray = (-below <= apart) & (apart <= above)
    return inside
