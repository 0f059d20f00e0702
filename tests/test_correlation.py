"""Correlations against those of scipy, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from geffect.correlation import correlation, fit, ranks


@pytest.mark.parametrize("count", [4, 5, 20, 300])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_r_and_its_interval_are_those_of_scipy(count: int, scale: float) -> None:
    rng = np.random.default_rng(count)
    x = rng.normal(size=count)
    y = scale * (x + rng.normal(size=count))
    found, known = correlation(x, y), stats.pearsonr(x, y)
    low, high = known.confidence_interval(0.95)
    assert (found.r, found.low, found.high) == pytest.approx((known.statistic, low, high))
    assert found.count == count
    u, v = x - x.mean(), y - y.mean()
    by_hand = float(u @ v / np.sqrt((u @ u) * (v @ v)))
    half = 1.959963984540054 / math.sqrt(count - 3)
    around = [math.tanh(math.atanh(by_hand) + sign * half) for sign in (-1, 1)]
    assert (found.r, found.low, found.high) == pytest.approx((by_hand, *around))
    narrower = correlation(x, y, level=0.5)
    assert found.low < narrower.low < found.r < narrower.high < found.high


def test_very_small_and_very_large_numbers_vary_too() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 1.0, 4.0, 6.0])
    expected = correlation(x, y).r
    for scale in (1e-250, 1e250):
        assert correlation(scale * x, y).r == pytest.approx(expected)


def test_ranks_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).integers(0, 6, size=40).astype(float)
    assert ranks(values).tolist() == (stats.rankdata(values) - 1).tolist()
    by_hand = [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
    assert ranks(values).tolist() == by_hand


@pytest.mark.parametrize(("x", "y"), [([1.0], [2.0]), ([], []), ([1, 2, 3, 4], [5, 5, 5, 5])])
def test_what_does_not_vary_has_no_correlation(x: list[float], y: list[float]) -> None:
    assert math.isnan(correlation(x, y).r)


def test_the_slope_is_that_of_a_line_and_0_where_nothing_varies() -> None:
    x = np.array([0.3, 1.7, 2.9, 9.1])
    assert fit(x, np.full(4, 0.1))[1] == 0.0
    y = np.array([1e6 + 0.1, 1e6 + 0.2, 1e6 - 0.3, 1e6])
    assert fit(x, y)[1] == pytest.approx(np.polyfit(x, y - 1e6, 1)[0])
    assert math.isnan(fit(x, np.array([1.0, math.inf, 2.0, 3.0]))[1])


def test_a_few_pairs_have_no_interval() -> None:
    found = correlation([1, 2, 3], [1, 3, 2])
    assert found.r == pytest.approx(0.5) and math.isnan(found.low)
    assert math.isnan(correlation([1, 2, 3, 4], [2, 4, 6, 8]).high)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2]), ([[1, 2]], [[1, 2]])]
)
def test_what_is_no_pair_of_columns_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="as many finite numbers each"):
        correlation(x, y)
