"""The gap to approximate retraining, against loops over tokens and draws."""

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect.evaluation import TokenTable, evaluate_tokens, perplexity, retraining_gap
from tests.utils import tiny
from tests.utils.audits import items

AUTHORS, OTHERS = ["a", "b", "a", "c", "b"], ["x", "y", "z", "x"]


def record(seed: int, subjects: list[str], *, empty: int | None = None) -> TokenTable:
    """Answers of one to six tokens, one of them maybe without any."""
    rng = np.random.default_rng(seed)
    lengths = [0 if i == empty else int(rng.integers(1, 7)) for i in range(len(subjects))]
    item = np.repeat(np.arange(len(subjects)), lengths)
    told = {"item": item, "is_end": False, "logprob": np.log(rng.random(len(item)))}
    told["right"] = rng.random(len(item)) < 0.5
    return TokenTable(pd.DataFrame(told), tuple(subjects), vocabulary=9)


def by_subject(table: TokenTable) -> dict[Any, list[dict[Hashable, Any]]]:
    """The tokens of each subject."""
    rows = table.tokens.to_dict("records")
    return {
        subject: [row for row in rows if table.subjects[row["item"]] == subject]
        for subject in dict.fromkeys(table.subjects)
    }


def of_drawn(
    tokens: dict[Any, list[dict[Hashable, Any]]], subjects: list[Any]
) -> tuple[float, float]:
    """Accuracy and perplexity of the tokens of some subjects, each as often as it is drawn."""
    right, log_p = [], []
    for subject in subjects:
        for row in tokens[subject]:
            right.append(row["right"])
            log_p.append(row["logprob"])
    if not right:
        return math.nan, math.nan
    return sum(right) / len(right), math.exp(-sum(log_p) / len(log_p))


@pytest.mark.parametrize("empty", [None, 2])
def test_it_is_that_of_loops_over_tokens(empty: int | None) -> None:
    unseen, forget = record(0, OTHERS), record(1, AUTHORS, empty=empty)
    found = retraining_gap(unseen, forget).set_index("metric")
    for of, name in ((unseen, "unseen"), (forget, "forget")):
        accuracy, expected = of_drawn(by_subject(of), [*dict.fromkeys(of.subjects)])
        assert found.loc["accuracy", name] == pytest.approx(accuracy)
        assert found.loc["perplexity", name] == pytest.approx(expected)
    assert found["gap"].tolist() == (found["unseen"] - found["forget"]).tolist()


def test_the_interval_is_that_of_a_loop_over_draws_of_subjects() -> None:
    unseen, forget = record(2, OTHERS), record(3, AUTHORS)
    found = retraining_gap(unseen, forget, replicates=4000, level=0.8).set_index("metric")
    draw = np.random.default_rng(7)
    sides = [(by_subject(unseen), [*"xyz"]), (by_subject(forget), [*"abc"])]
    gaps = []
    for _ in range(2000):
        drawn = [
            of_drawn(tokens, draw.choice(names, len(names)).tolist()) for tokens, names in sides
        ]
        gaps.append(np.subtract(*drawn))
    low, high = np.quantile(gaps, [0.1, 0.9], axis=0)
    for i, (metric, width) in enumerate((("accuracy", 0.04), ("perplexity", 0.2))):
        assert found.loc[metric, "low"] == pytest.approx(low[i], abs=width)
        assert found.loc[metric, "high"] == pytest.approx(high[i], abs=width)


def test_a_model_is_as_far_from_itself_as_its_sets_are() -> None:
    model = tiny.llama(0)
    first, second = (evaluate_tokens(model, items(seed)) for seed in (1, 2))
    found = retraining_gap(first, second).set_index("metric")
    assert found.loc["perplexity", "unseen"] == pytest.approx(perplexity(first))
    assert found.loc["accuracy", "forget"] == second.counted["right"].mean()
    same = retraining_gap(first, first)
    assert (same["gap"] == 0).all() and (same["low"] <= 0).all() and (same["high"] >= 0).all()
    swapped = retraining_gap(second, first).set_index("metric")
    assert (swapped["gap"] == -found["gap"]).all()


def test_of_one_subject_there_is_no_interval() -> None:
    found = retraining_gap(record(0, OTHERS), record(1, ["a", "a", "a"]))
    assert found[["low", "high"]].isna().all(axis=None) and found["gap"].notna().all()


def test_what_cannot_be_compared_is_refused() -> None:
    unseen, forget = record(0, OTHERS), record(1, AUTHORS)
    with pytest.raises(ValueError, match="`forget` should have a token that counts"):
        retraining_gap(unseen, record(1, ["a"], empty=0))
    with pytest.raises(ValueError, match=r"one vocabulary.*Found 8 tokens and 9"):
        retraining_gap(replace(unseen, vocabulary=8), forget)
    with pytest.raises(ValueError, match="ends of answers in the same way"):
        retraining_gap(unseen, replace(forget, include_end=True))
    with pytest.raises(ValueError, match="`level` should be between 0 and 1"):
        retraining_gap(unseen, forget, level=1.0)
