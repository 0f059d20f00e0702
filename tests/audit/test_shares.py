"""Recoverable shares against a loop over draws, and what they mean."""

import numpy as np
import pandas as pd
import pytest

from geffect.audit.shares import (
    Floor,
    Share,
    noise_level,
    recoverable_share,
    recoverable_shares,
    retraining_noise,
    strongest,
    widened,
)
from geffect.audit.table import units_of
from geffect.evaluation.resampling import resamples

NAN = float("nan")
SUBJECTS = [name for name in "abcdefg" for _ in range(4)]


def values(mean: float, seed: int, count: int = len(SUBJECTS)) -> np.ndarray:
    return mean + 0.3 * np.random.default_rng(seed).standard_normal(count)


UNLEARNED, RETRAINED, ORIGINAL = values(3.0, 0), values(4.0, 1), values(0.1, 2)


def test_a_loop_over_draws_finds_the_same() -> None:
    found = recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS)
    u, g, o = UNLEARNED.mean(), RETRAINED.mean(), ORIGINAL.mean()
    assert found.value == pytest.approx((u - g) / (o - g), rel=1e-12)
    drawn = []
    for weights in resamples(units_of(SUBJECTS), 2000, seed=0):
        rows = [i for i, times in enumerate(weights) for _ in range(int(times))]
        assert len({SUBJECTS[i] for i in rows}) * 4 == len(set(rows))  # subjects are drawn whole
        u, g, o = (np.mean([x[i] for i in rows]) for x in (UNLEARNED, RETRAINED, ORIGINAL))
        drawn.append((u - g) / (o - g))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.low < found.value < found.high
    assert found.n == 28 and not found.floor_estimated
    assert recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS) == found


def test_shares_of_values_that_rise_and_that_fall_are_the_same() -> None:
    falling = recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS)
    rising = recoverable_share(-UNLEARNED, -RETRAINED, -ORIGINAL, SUBJECTS, rises=True)
    assert rising == falling
    turned = recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS, rises=True)
    assert np.isnan(turned.value) and np.isnan(turned.low)  # the original knows less: no share


def test_the_retrained_model_has_no_share_and_the_original_all() -> None:
    assert recoverable_share(RETRAINED, RETRAINED, ORIGINAL, SUBJECTS).value == 0
    whole = recoverable_share(ORIGINAL, RETRAINED, ORIGINAL, SUBJECTS)
    assert whole.value == pytest.approx(1) and whole.low == pytest.approx(1)


def test_pairs_are_drawn_together() -> None:
    hard = 2.0 * np.arange(len(SUBJECTS)) / len(SUBJECTS)  # the same items are hard for all
    paired = recoverable_share(3 + hard, 4 + hard, hard, SUBJECTS)
    assert paired.high - paired.low < 1e-9
    assert paired.value == pytest.approx(0.25)


def test_the_order_of_items_changes_no_share() -> None:
    order = np.random.default_rng(5).permutation(len(SUBJECTS))
    moved = [SUBJECTS[i] for i in order]
    found = recoverable_share(UNLEARNED[order], RETRAINED[order], ORIGINAL[order], moved)
    right = recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS)
    assert found.value == pytest.approx(right.value, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((right.low, right.high), abs=0.02)


def test_items_without_a_value_are_left_out_of_all() -> None:
    some = UNLEARNED.copy()
    some[3] = NAN
    other = ORIGINAL.copy()
    other[7] = NAN
    kept = [i for i in range(len(SUBJECTS)) if i not in (3, 7)]
    found = recoverable_share(some, RETRAINED, other, SUBJECTS)
    about = [SUBJECTS[i] for i in kept]
    assert found == recoverable_share(UNLEARNED[kept], RETRAINED[kept], ORIGINAL[kept], about)
    nothing = recoverable_share(np.full(28, NAN), RETRAINED, ORIGINAL, SUBJECTS)
    assert np.isnan(nothing.value) and nothing.n == 0
    one = recoverable_share([2.0], [4.0], [0.0], ["a"])
    assert one.value == 0.5 and np.isnan([one.low, one.high]).all()


def test_a_floor_of_other_items_is_estimated() -> None:
    holdout = values(3.5, 6, 40)
    floor = Floor(holdout, [str(i // 4) for i in range(40)])
    found = recoverable_share(UNLEARNED, floor, ORIGINAL, SUBJECTS)
    u, g, o = UNLEARNED.mean(), holdout.mean(), ORIGINAL.mean()
    assert found.floor_estimated and found.value == pytest.approx((u - g) / (o - g))
    drawn = []
    weights = resamples(units_of(SUBJECTS), 2000, seed=0)
    beside = resamples(units_of(floor.subjects or ()), 2000, seed=1)
    for own, other in zip(weights, beside, strict=True):
        u, o = (np.average(x, weights=own) for x in (UNLEARNED, ORIGINAL))
        g = np.average(holdout, weights=other)
        drawn.append((u - g) / (o - g))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_draws_without_a_share_count_against_both_bounds() -> None:
    original = np.where(np.arange(28) < 4, 0.0, 3.9)  # it knows one subject, as one in many draws
    few = recoverable_share(UNLEARNED, np.full(28, 4.0), original, SUBJECTS)
    assert np.isfinite([few.low, few.high]).all()
    half = recoverable_share(UNLEARNED, RETRAINED, RETRAINED - values(0.05, 9), SUBJECTS)
    assert np.isfinite(half.value) and np.isnan([half.low, half.high]).all()


def test_shares_of_several_attacks_and_the_strongest() -> None:
    attacked = {"int8": UNLEARNED + 0.9, "int4": UNLEARNED - 1.0, "nf4": np.full(28, NAN)}
    floor = {"int8": RETRAINED, "int4": RETRAINED + 0.1, "nf4": RETRAINED}
    table = recoverable_shares(attacked, floor, ORIGINAL, SUBJECTS)
    assert table["attack"].tolist() == ["int8", "int4", "nf4"]
    for row in table.to_dict("records"):
        alone = recoverable_share(attacked[row["attack"]], floor[row["attack"]], ORIGINAL, SUBJECTS)
        assert np.array_equal([row["value"], row["low"]], [alone.value, alone.low], equal_nan=True)
    found = strongest(table, floor, ORIGINAL, SUBJECTS)
    assert found is not None and found.attack == "int4"
    assert found.share == recoverable_share(attacked["int4"], floor["int4"], ORIGINAL, SUBJECTS)
    levels = [noise_level(floor[name], ORIGINAL, SUBJECTS) for name in floor]
    assert found.noise == max(levels)
    assert strongest(table[table["attack"] == "nf4"], floor, ORIGINAL, SUBJECTS) is None


def test_noise_is_the_larger_share_of_two_halves() -> None:
    units = units_of(SUBJECTS)
    ways = []
    for half in (0, 1):
        own = [i for i in range(28) if units[i] % 2 == half]
        other = [i for i in range(28) if units[i] % 2 != half]
        u, g, o = RETRAINED[own].mean(), RETRAINED[other].mean(), ORIGINAL[own].mean()
        ways.append((u - g) / (o - g))
    found = noise_level(RETRAINED, ORIGINAL, SUBJECTS)
    assert found == pytest.approx(max(ways)) and 0 < found < 0.1
    assert np.isnan(noise_level([4.0], [0.0], ["a"]))
    holdout = Floor(values(3.5, 6, 40), [str(i // 4) for i in range(40)])
    assert 0 < noise_level(holdout, ORIGINAL, SUBJECTS) < 0.1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`unlearned` should have a value for each of the 28"):
        recoverable_share(UNLEARNED[1:], RETRAINED, ORIGINAL, SUBJECTS)
    with pytest.raises(ValueError, match=r"`floor` should have a value for each of the 3 subjects"):
        recoverable_share(UNLEARNED, Floor(RETRAINED, [*"abc"]), ORIGINAL, SUBJECTS)
    with pytest.raises(ValueError, match=r"`floor` should be finite, or NaN .* Found infinity"):
        recoverable_share(UNLEARNED, RETRAINED * np.inf, ORIGINAL, SUBJECTS)
    with pytest.raises(ValueError, match=r"under the same attacks, one or more\. Found 'int8'"):
        recoverable_shares({"int8": UNLEARNED}, {}, ORIGINAL, SUBJECTS)
    with pytest.raises(ValueError, match="Found none in one alone"):
        recoverable_shares({}, {}, ORIGINAL, SUBJECTS)
    with pytest.raises(ValueError, match=r"`floor` should have a value for each"):
        noise_level(RETRAINED[1:], ORIGINAL, SUBJECTS)


def test_tables_are_frames() -> None:
    table = recoverable_shares({"int8": UNLEARNED}, {"int8": RETRAINED}, ORIGINAL, SUBJECTS)
    assert isinstance(table, pd.DataFrame)
    assert [*table] == ["attack", "value", "low", "high", "n", "floor_estimated"]


def test_the_noise_of_retraining_is_that_of_an_analysis_of_variance() -> None:
    values = np.random.default_rng(3).normal(size=(4, 9)) + np.arange(4)[:, None]
    k, n = values.shape
    rows, columns, whole = values.mean(1), values.mean(0), values.mean()
    between = sum(n * (row - whole) ** 2 for row in rows) / (k - 1)
    within = sum(
        (values[i, j] - rows[i] - columns[j] + whole) ** 2 for i in range(k) for j in range(n)
    ) / ((k - 1) * (n - 1))
    component = (between - within) / n
    variance = (2 * 0.05**2 + (k - 1) * component / 3.0**2) / (k + 1)
    expected = (variance * (1 + 1 / k)) ** 0.5
    assert retraining_noise(values, 3.0, 0.05) == pytest.approx(expected, rel=1e-12)
    assert retraining_noise(values, -3.0, 0.05) == pytest.approx(expected, rel=1e-12)
    some = np.column_stack([values, [NAN, *[0.0] * (k - 1)]])
    assert retraining_noise(some, 3.0, 0.05) == pytest.approx(expected, rel=1e-12)


def test_one_retrained_model_has_the_noise_that_is_stated() -> None:
    one = retraining_noise([values(4.0, 0)], 4.0, 0.06)
    assert one == pytest.approx(0.06 * 2**0.5)
    assert retraining_noise(np.empty((1, 0)), NAN, 0.06) == one
    # Models that differ by their items alone have less of it, and more models still less.
    alike = [retraining_noise([values(4.0, 0)] * k, 4.0, 0.06) for k in (2, 3, 6)]
    assert [*alike] == sorted(alike, reverse=True) and alike[0] < one


def test_the_interval_of_a_share_holds_both_noises() -> None:
    share = recoverable_share(UNLEARNED, RETRAINED, ORIGINAL, SUBJECTS)
    wide = widened(share, 0.1)
    assert wide.low == pytest.approx(share.value - np.hypot(share.value - share.low, 0.196))
    assert wide.high == pytest.approx(share.value + np.hypot(share.high - share.value, 0.196))
    assert widened(share, 0.0) == share and wide.value == share.value
    assert np.isnan(widened(Share(0.5, NAN, NAN, 1), 0.1).low)
