"""Forget quality and model utility against pinned numbers and distribution functions."""

import math

import numpy as np
import pytest
from scipy import stats

from geffect.evaluation import forget_quality, model_utility
from geffect.evaluation.tofu import harmonic_mean

X = np.array([0.2, 0.3, 0.35, 0.5, 0.8])
Y = np.array([0.55, 0.6, 0.7, 0.75, 0.9])


def test_pinned() -> None:
    found = forget_quality(X, Y)
    assert (found.distance, found.sign, found.n) == (pytest.approx(0.8), -1, (5, 5))
    assert found.p == pytest.approx(0.079365, abs=1e-6)
    often = forget_quality(np.tile(X, 20), np.tile(Y, 20))
    assert often.distance == pytest.approx(0.8) and often.p == pytest.approx(3.6e-32, rel=0.02)


def test_inverting_ratios_turns_the_sign_alone() -> None:
    found, inverted, swapped = (
        forget_quality(X, Y),
        forget_quality(1 / X, 1 / Y),
        forget_quality(Y, X),
    )
    assert inverted == swapped and inverted.sign == 1
    assert (inverted.distance, inverted.p) == (found.distance, found.p)
    both = [0.1, 0.9], [0.4, 0.5]  # as far below as above
    assert forget_quality(*both) == forget_quality(*both[::-1])
    assert forget_quality(*both).sign == 0 and forget_quality(*both).distance == 0.5
    same = forget_quality(X, X)
    assert (same.distance, same.sign, same.p) == (0.0, 0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_is_that_of_distribution_functions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=23), rng.normal(loc=seed - 2, size=40)
    differences = [(x <= v).mean() - (y <= v).mean() for v in (*x, *y)]
    largest = max(differences, key=abs)
    found = forget_quality(np.append(x, np.nan), y)
    assert found.distance == pytest.approx(abs(largest)) and found.n == (23, 40)
    assert found.sign == (-1 if largest > 0 else 1)
    assert found.p == pytest.approx(stats.ks_2samp(x, y).pvalue)


def test_without_values_there_is_no_quality() -> None:
    with pytest.raises(ValueError, match="Found 0 and 5 that are numbers"):
        forget_quality([math.nan], Y)
    with pytest.raises(ValueError, match="no forget quality"):
        forget_quality(X, None)  # type: ignore[arg-type]


def test_harmonic_means() -> None:
    assert harmonic_mean([0.9, 0.8, 0.5]) == pytest.approx(0.687898, abs=1e-6)
    assert harmonic_mean([0.9, 0.0]) == 0.0 and math.isnan(harmonic_mean([0.0, math.nan]))
    for values in ([], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="from 0 on, one or more"):
            harmonic_mean(values)


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    rng = np.random.default_rng(0)
    sets = {
        name: dict(zip(("prob", "rouge", "truth_ratio"), rng.random(3), strict=True))
        for name in ("retain", "authors", "world")
    }
    table = model_utility(sets)
    nine = [value for metrics in sets.values() for value in metrics.values()]
    assert table["value"].tolist()[:9] == nine
    assert table["value"].iloc[-1] == pytest.approx(9 / sum(1 / v for v in nine))
    with pytest.raises(ValueError, match="`retain` should have prob, rouge, truth_ratio"):
        model_utility({"retain": {"prob": 1.0}})
