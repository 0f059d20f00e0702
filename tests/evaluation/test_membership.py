"""AUC, PrivLeak and their bootstrap against loops over pairs and draws."""

import math
from dataclasses import replace

import numpy as np
import pytest

from geffect.evaluation import Scores, auc, membership, privleak

FORGET, HOLDOUT = [0.2, 0.4, 1.0], [0.5, 0.9, 1.4, 2.0]


def pairs(forget: np.ndarray, holdout: np.ndarray) -> float:
    won = [(h > f) + 0.5 * (h == f) for f in forget for h in holdout]
    return float(sum(won) / len(won))


def test_pinned() -> None:
    assert auc(FORGET, HOLDOUT) == pytest.approx(10 / 12)
    assert privleak(10 / 12, 0.52) == pytest.approx(-65.28, abs=0.005)
    assert privleak(10 / 12, 0.5) == pytest.approx(-66.67, abs=0.005)
    assert privleak(1.0, 0.5) == -100.0 and privleak(0.5, 0.5) == 0.0 < privleak(0.2, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    forget, holdout = (rng.integers(0, 8, size=n).astype(float) for n in (13, 20))
    assert auc(forget, holdout) == pytest.approx(pairs(forget, holdout))
    assert auc(np.append(forget, math.nan), holdout) == auc(forget, holdout)
    assert auc(forget, forget) == 0.5 and auc([math.inf], [math.inf, -math.inf]) == 0.25


def test_nothing_stands_in_for_a_retrained_model() -> None:
    for retrained in (None, math.nan, 1.5):
        with pytest.raises(ValueError, match="`retrained` should be an AUC"):
            privleak(0.8, retrained)
    assert math.isnan(privleak(0.8, 1.0))
    with pytest.raises(ValueError, match="`holdout` should have scores"):
        auc(FORGET, [math.nan])


def test_the_interval_is_that_of_a_loop_over_draws() -> None:
    rng = np.random.default_rng(3)
    unlearned = Scores(rng.normal(size=12), rng.normal(0.5, size=9))
    retrained = Scores(rng.normal(size=12), rng.normal(size=9))
    authors, others = (
        [f"a{i // 3}" for i in range(12)],
        ["x", "y", "x", "z", "y", "u", "v", "w", "w"],
    )
    found = membership(
        unlearned, retrained, forget_subjects=authors, holdout_subjects=others, replicates=2000
    )
    draw = np.random.default_rng(99)
    differences = []
    for _ in range(2000):
        chosen = []
        for subjects in (authors, others):
            names = list(dict.fromkeys(subjects))
            drawn = [names[d] for d in draw.choice(len(names), size=len(names))]
            chosen.append([i for name in drawn for i, s in enumerate(subjects) if s == name])
        both = []
        for model in (unlearned, retrained):
            f, h = np.asarray(model.forget)[chosen[0]], np.asarray(model.holdout)[chosen[1]]
            both.append((h > f[:, None]).mean() + 0.5 * (h == f[:, None]).mean())
        differences.append(both[0] - both[1])
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert found.unlearned == pairs(np.asarray(unlearned.forget), np.asarray(unlearned.holdout))
    assert found.difference == found.unlearned - found.retrained
    assert found.privleak == privleak(found.unlearned, found.retrained)
    again = membership(
        unlearned, retrained, forget_subjects=authors, holdout_subjects=others, replicates=2000
    )
    assert again == found and found.low < found.difference < found.high
    apart = membership(unlearned, retrained, replicates=2000)
    assert (apart.low, apart.high) != (found.low, found.high)


def test_models_are_drawn_together() -> None:
    """So the same scores never differ, and a shift of all of them is certain."""
    rng = np.random.default_rng(0)
    scores = Scores(rng.normal(size=30), rng.normal(size=30))
    same = membership(scores, scores)
    assert (same.difference, same.low, same.high, same.privleak) == (0.0, 0.0, 0.0, 0.0)
    gone = Scores(np.asarray(scores.forget) + 99, scores.holdout)
    found = membership(gone, scores)
    assert found.unlearned == 0.0 and found.high < 0 < found.privleak


def test_one_subject_has_no_interval() -> None:
    one, other = Scores(FORGET, HOLDOUT), Scores(HOLDOUT[:3], HOLDOUT)
    found = membership(one, other, forget_subjects=["Ada"] * 3, replicates=20)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.difference == auc(FORGET, HOLDOUT) - auc(HOLDOUT[:3], HOLDOUT)


def test_an_item_without_a_score_is_left_out_of_both() -> None:
    rng = np.random.default_rng(1)
    forget, other, holdout = rng.normal(size=(3, 55))
    with_nan = np.append(forget, math.nan), np.append(other, 0.3)
    expected = membership(Scores(forget, holdout), Scores(other, holdout), replicates=50)
    found = membership(Scores(with_nan[0], holdout), Scores(with_nan[1], holdout), replicates=50)
    assert found == expected and found.n_forget == 55 and found.is_enough
    assert not replace(found, n_holdout=49).is_enough


def test_what_is_no_pair_of_models_is_refused() -> None:
    scores = Scores(FORGET, HOLDOUT)
    with pytest.raises(
        ValueError, match=r"`forget` should be one for each item.*\(3,\) and \(2,\)"
    ):
        membership(scores, Scores(FORGET[:2], HOLDOUT))
    with pytest.raises(ValueError, match="and 1 subjects"):
        membership(scores, scores, holdout_subjects=["a"])
    for options in ({"level": 1.0}, {"replicates": 0}):
        with pytest.raises(ValueError, match="`level` should be between 0 and 1"):
            membership(scores, scores, **options)  # type: ignore[arg-type]
