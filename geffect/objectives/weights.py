"""What an objective's implicit weights are summed up as: how the gradient is spread over the data.

Weights are those of answer tokens or of samples. Padding has none: a mean over padded positions,
where the loss is 0 and p therefore 1, would depend on the length of the padding.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Statistics(NamedTuple):
    """Four numbers that describe the weights of a step."""

    mean: float
    median: float
    p95: float
    max: float


def statistics(weights: Tensor) -> Statistics:
    """Mean, median, 95th percentile and maximum of the weights of a step; NaN if there are none.

    The median of an even number of weights, and the percentile, are interpolated.

    >>> import torch
    >>> statistics(torch.arange(21.0))
    Statistics(mean=10.0, median=10.0, p95=19.0, max=20.0)
    """
    values = weights.detach().flatten().double().cpu().numpy()
    if not values.size:
        return Statistics(*[float("nan")] * 4)
    return Statistics(
        mean=float(np.mean(values)),
        median=float(np.median(values)),
        p95=float(np.quantile(values, 0.95)),
        max=float(np.max(values)),
    )


def inverse_confidence(log_p: Tensor, scored: Tensor) -> Tensor:
    """1/p_i of the scored tokens, `Float64[token]`: the weight of GA on grad p_i.

    It explodes on what is already forgotten. `log_p` and `scored` are what
    `token_log_probabilities` returns.

    >>> import torch
    >>> log_p = torch.tensor([[0.1, 0.5, 1.0]]).log()
    >>> inverse_confidence(log_p, torch.tensor([[True, True, False]])).round(decimals=3)
    tensor([10.,  2.], dtype=torch.float64)
    """
    return (-log_p.detach()[scored].double()).exp()
