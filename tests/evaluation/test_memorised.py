"""What is memorised against numbers by hand and loops over tokens."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect.data.collate import collate
from geffect.evaluation import (
    TokenTable,
    evaluate_tokens,
    extraction_strength,
    memorised,
    prob_options,
    truth_ratio,
)
from geffect.evaluation.memorised import el2n, in_band, strength
from geffect.evaluation.truth_ratio import closer_to_one, true_better
from tests.utils import tiny
from tests.utils.predictions import END, five


def recorded(answers: list[list[dict[str, Any]]]) -> TokenTable:
    """The record of some answers, a dict a token."""
    rows = [{"item": i, "is_end": False, **token} for i, a in enumerate(answers) for token in a]
    return TokenTable(pd.DataFrame(rows), tuple(range(len(answers))), vocabulary=5)


def random_record(seed: int = 0) -> tuple[TokenTable, list[list[dict[str, Any]]]]:
    rng = np.random.default_rng(seed)
    answers: list[list[dict[str, Any]]] = [
        [
            {
                "logprob": -float(rng.exponential()),
                "right": bool(rng.random() < 0.6),
                "entropy": float(rng.random()),
                "el2n": float(rng.random()),
            }
            for _ in range(length)
        ]
        for length in (3, 1, 0, 8, 5)
    ]
    return recorded(answers), answers


def by_hand(answer: list[dict[str, Any]]) -> dict[str, float]:
    n = len(answer)
    if not n:
        return dict.fromkeys(("nll", "prob", "em", "es", "entropy"), math.nan)
    nll = -sum(token["logprob"] for token in answer) / n
    k = max([j for j, token in enumerate(answer, start=1) if not token["right"]], default=0)
    return {
        "nll": nll,
        "prob": math.prod(math.exp(token["logprob"]) for token in answer) ** (1 / n),
        "em": sum(token["right"] for token in answer) / n,
        "es": 1 - k / n,
        "entropy": sum(token["entropy"] for token in answer) / n,
    }


def test_metrics_are_those_of_a_loop() -> None:
    table, answers = random_record()
    found = memorised(table)
    for index, answer in enumerate(answers):
        own = found[found["item"] == index].set_index("metric")["value"].to_dict()
        assert own == pytest.approx(by_hand(answer), nan_ok=True)
    assert [*found.columns] == ["item", "subject", "metric", "value"]
    assert el2n(table)[1] == answers[1][0]["el2n"]


def test_the_pinned_answer() -> None:
    model, item = five()
    table = evaluate_tokens(model, [item], ends=[END])
    values = memorised(table).set_index("metric")["value"]
    with_end = memorised(replace(table, include_end=True)).set_index("metric")["value"]
    assert values[["nll", "prob", "em", "es"]].tolist() == pytest.approx(
        [0.657772, 0.518004, 0.75, 0.25], abs=1e-6
    )
    assert with_end[["nll", "prob"]].tolist() == pytest.approx([0.536476, 0.584805], abs=1e-6)


def test_strength_is_extraction_strength() -> None:
    model = tiny.llama(5)
    rows = [{name: of[i] for name, of in tiny.batch(4, rows=6).items()} for i in range(6)]
    for ends, include in (([], False), ([7], False), ([7], True)):
        table = evaluate_tokens(model, rows, ends=ends, include_end=include)
        expected = extraction_strength(model, collate(rows), ends=ends, include_end=include)
        assert strength(table).tolist() == expected.tolist()
    wrong = [{"right": False, "logprob": -1.0}] * 4
    assert strength(recorded([wrong])).tolist() == [0.0]  # not 1/n


def test_an_answer_that_is_impossible_is_no_nan() -> None:
    table = recorded([[{"logprob": -math.inf, "right": False, "entropy": 0.0}] * 2])
    values = memorised(table).set_index("metric")["value"]
    assert values[["nll", "prob"]].tolist() == [math.inf, 0.0]


NLL = [0.5, 2.0], [[1.0, 3.0], [1.0, 1.5]]


@pytest.mark.parametrize(
    ("definition", "values"),
    [
        ("geometric", [0.223130, 2.117000]),
        ("tofu", [0.344308, 2.183502]),
        ("share", [0.817574, 0.320821]),
    ],
)
def test_pinned_truth_ratios(definition: Any, values: list[float]) -> None:
    assert truth_ratio(*NLL, definition).tolist() == pytest.approx(values, abs=1e-6)


def test_pinned_aggregates() -> None:
    geometric = truth_ratio(*NLL, "geometric")
    assert closer_to_one(geometric).mean() == pytest.approx(0.347748, abs=1e-6)
    assert true_better(geometric).mean() == pytest.approx(0.388435, abs=1e-6)
    assert truth_ratio(*NLL).mean() == pytest.approx(0.569198, abs=1e-6)
    assert prob_options(*NLL).mean() == pytest.approx(0.389262, abs=1e-6)


def test_truth_ratios_are_those_of_products_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.exponential(size=9), [rng.exponential(size=1 + i % 4) for i in range(9)]
    for index, (c, w) in enumerate(zip(np.exp(-right), [np.exp(-x) for x in wrong], strict=True)):
        geometric, mean = math.prod(w) ** (1 / len(w)), sum(w) / len(w)
        found = [truth_ratio(right, wrong, d)[index] for d in ("geometric", "tofu", "share")]
        assert found == pytest.approx([geometric / c, mean / c, c / (c + geometric)])
        assert prob_options(right, wrong)[index] == pytest.approx(c / (c + sum(w)))


def test_an_item_without_answers_to_compare_has_no_ratio() -> None:
    """Nor are the others taken for it: values stay with their items."""
    right, wrong = [1.0, math.nan, 1.0, 0.5], [[2.0], [2.0], [], [math.nan, 1.0]]
    for definition in ("geometric", "tofu", "share"):
        found = truth_ratio(right, wrong, definition)
        assert np.isnan(found).tolist() == [False, True, True, True]
    assert np.isnan(prob_options(right, wrong)).tolist() == [False, True, True, True]


@pytest.mark.filterwarnings("error")
def test_ratios_of_what_is_far_apart() -> None:
    assert truth_ratio([900.0], [[0.0]], "geometric").tolist() == [math.inf]
    assert truth_ratio([900.0], [[0.0]]).tolist() == [0.0] == prob_options([900], [[0]]).tolist()
    assert truth_ratio([0.0], [[900.0, math.inf]]).tolist() == [1.0]
    for definition in ("geometric", "tofu", "share"):  # 0 / 0
        assert np.isnan(truth_ratio([math.inf], [[math.inf]], definition)).all()
    assert np.isnan(prob_options([math.inf], [[math.inf]])).all()
    assert closer_to_one(np.array([0.0, math.inf])).tolist() == [0.0, 0.0]


def test_what_is_no_answer_an_item_is_refused() -> None:
    for wrong in ([[1.0]], [[[1.0]], [[1.0]]]):
        with pytest.raises(ValueError, match="an array of nll for each item"):
            truth_ratio([1.0, 2.0], wrong)
    with pytest.raises(ValueError, match="Found 'mean'"):
        truth_ratio([1.0], [[1.0]], "mean")  # type: ignore[arg-type]


def test_a_band_leaves_out_what_is_far_from_the_mean() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0, 14.0, math.nan])
    mean, sd = 4.0, math.sqrt(sum((v - 4.0) ** 2 for v in (0, 1, 2, 3, 14)) / 5)
    expected = [mean - 0.5 * sd <= v <= mean + 0.3 * sd for v in values]
    assert not in_band(np.array([math.nan] * 2), 0.5, 0.5).any()
    assert in_band(np.ones(2), 0.5, 0.5).all()
    assert (
        in_band(values, 0.5, 0.3).tolist() == expected == [False, False, True, True, False, False]
    )
