"""The noise of retraining in each attack: in the unit of its metric, and so in its share."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect.audit.shares import recoverable_share
from geffect.audit.summary import table_of
from geffect.audit.table import per_item
from geffect.audit.thresholds import RETRAINING, Thresholds
from geffect.audit.verdict import Verdict, judged

SUBJECTS = [f"author {i // 2}" for i in range(24)]
SWAP, INT4 = "decoder swap", "rounding to int4"
KEPT = per_item("utility", "es", "retain", "", [1.0] * 24, SUBJECTS)


def values(mean: float, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    """Values of items around a mean that is theirs exactly."""
    drawn = np.random.default_rng(seed).normal(size=len(SUBJECTS))
    return mean + spread * (drawn - drawn.mean())


def audited(means: dict[str, dict[str, float]]) -> pd.DataFrame:
    """The items of an audit in which each model has a mean under each attack; plain under nll."""
    rows = [KEPT.assign(model=model) for model in ("original", "retrained", "unlearned")]
    for model, under in means.items():
        for metric, mean in under.items():
            battery = "memorised" if metric in RETRAINING else "hidden"
            rows.append(per_item(battery, metric, "forget", model, values(mean), SUBJECTS))
    return pd.concat(rows, ignore_index=True)


def share_of(table: pd.DataFrame, attack: str) -> Any:
    own = table[(table["model"] == "unlearned") & (table["metric"] == attack)]
    return own[own["battery"].str.endswith("share")].iloc[0]


def verdict_of(means: dict[str, dict[str, float]], limits: Thresholds | None = None) -> Verdict:
    limits = limits or Thresholds()
    return judged(table_of(audited(means), limits), limits)


ORIGINAL = {"nll": 0.0, "prob": 1.0}


def test_the_interval_holds_the_noise_of_the_metric_over_what_the_attack_leaves() -> None:
    means = {
        "original": ORIGINAL,
        "retrained": {"nll": 4.0, "prob": 0.0, SWAP: 2.5, INT4: 4.0},
        "unlearned": {"nll": 4.0, "prob": 0.0, SWAP: 2.0, INT4: 3.8},
    }
    table = table_of(audited(means), Thresholds())
    for attack in (SWAP, INT4):
        u, g = (means[model][attack] for model in ("unlearned", "retrained"))
        items = recoverable_share(values(u), values(g), values(0.0), SUBJECTS)
        one = Thresholds().retraining * 4.0 / g  # of the share of one model
        reach = 1.96 * one * 2**0.5  # two differ, the one that is audited and the other
        found = share_of(table, attack)
        assert found["value"] == pytest.approx(1 - u / g)
        assert found["low"] == pytest.approx(u_low(items.value, items.low, reach))
        assert found["high"] == pytest.approx(u_high(items.value, items.high, reach))


def u_low(value: float, low: float, reach: float) -> float:
    return float(value - np.hypot(value - low, reach))


def u_high(value: float, high: float, reach: float) -> float:
    return float(value + np.hypot(high - value, reach))


def test_what_differs_like_a_retrained_model_is_not_hidden_where_little_is_left() -> None:
    # Three tenths of a nat are little of four, and half of what this attack leaves.
    means = {
        "original": ORIGINAL,
        "retrained": {"nll": 4.0, "prob": 0.0, SWAP: 0.6, INT4: 4.0},
        "unlearned": {"nll": 4.0, "prob": 0.0, SWAP: 0.3, INT4: 4.0},
    }
    found = verdict_of(means)
    assert found.verdict == "never knew", found.sentence
    assert [flag for flag in found.flags if flag.startswith("blind: by decoder swap")]
    # What is there for certain is found all the same.
    means["retrained"][SWAP], means["unlearned"][SWAP] = 2.5, 0.0
    found = verdict_of(means)
    assert (found.verdict, found.attack) == ("hidden", SWAP)
    assert not [flag for flag in found.flags if flag.startswith("blind")]


def test_a_share_of_next_to_nothing_is_not_judged() -> None:
    # Of the two hundredths that the original knows more three come back: by chance.
    means = {
        "original": {"nll": 0.0, "prob": 0.30},
        "retrained": {"nll": 4.0, "prob": 0.28, INT4: 4.0, "prompt sure": 0.28},
        "unlearned": {"nll": 4.0, "prob": 0.28, INT4: 4.0, "prompt sure": 0.31},
    }
    found = verdict_of(means)
    assert found.verdict == "never knew", found.sentence
    assert [flag for flag in found.flags if flag.startswith("blind: by prompt sure what")]
    # And what a model knows that never knew is no measure of what is there, of no answer.
    for prob, told in ((0.89, ["prob of all"]), (0.91, [])):
        means["original"]["prob"], means["retrained"]["prob"] = prob + 0.08, prob
        table = table_of(audited(means), Thresholds())
        assert [*table[table["battery"] == "direct share"]["metric"]] == told


def test_where_no_attack_tells_nothing_is_said() -> None:
    means = {
        "original": ORIGINAL,
        "retrained": {"nll": 4.0, "prob": 0.0, SWAP: 0.3},
        "unlearned": {"nll": 4.0, "prob": 0.0, SWAP: 0.2},
    }
    found = verdict_of(means)
    assert found.verdict == "undecided"
    assert found.reasons[0].startswith("No attack tells it from a model that never knew")


def test_a_metric_that_retrained_models_agree_in_proves_less() -> None:
    means = {
        "original": ORIGINAL,
        "retrained": {"nll": 4.0, "prob": 0.0, INT4: 4.0, "prompt sure": 0.0},
        "unlearned": {"nll": 4.0, "prob": 0.0, INT4: 3.2, "prompt sure": 0.2},
    }
    table = table_of(audited(means), Thresholds())
    of_nll, of_prob = (share_of(table, attack) for attack in (INT4, "prompt sure"))
    assert of_nll["value"] == pytest.approx(of_prob["value"]) == pytest.approx(0.2)
    assert of_nll["low"] < 0.05 < of_prob["low"]
    assert judged(table).attack == "prompt sure"


@pytest.mark.parametrize("left", [4.0, 2.5, 1.0, 0.4])
def test_models_that_differ_by_their_seeds_alone_are_hardly_ever_called_hidden(left: float) -> None:
    """Each is drawn with the noise that is stated, whatever an attack leaves to know."""
    limits, draw = Thresholds(), np.random.default_rng(5)
    called = 0
    for _ in range(60):
        own, other = 4.0 * limits.retraining * draw.normal(size=2)
        means = {
            "original": ORIGINAL,
            "retrained": {"nll": 4.0, "prob": 0.0, INT4: 4.0, SWAP: left + other},
            "unlearned": {"nll": 4.0, "prob": 0.0, INT4: 4.0, SWAP: left + own},
        }
        called += verdict_of(means, limits).verdict == "hidden"
    assert called <= 3  # of 60, where 2.5 % are beyond an interval of 95 % on one side


def test_what_an_attack_adds_is_held_against_the_same_metric_without_it() -> None:
    means = {
        "original": ORIGINAL,
        "retrained": {"nll": 4.0, "prob": 0.0, SWAP: 2.5, INT4: 3.9},
        "unlearned": {"nll": 2.4, "prob": 0.1, SWAP: 0.5, INT4: 2.34},
    }
    table = table_of(audited(means), Thresholds())
    gained = table[table["battery"] == "gained share"].set_index("metric")["value"]
    there = (4.0 - 2.4) / 4.0
    assert gained[INT4] == pytest.approx((3.9 - 2.34) / 3.9 - there)
    assert gained[SWAP] == pytest.approx((2.5 - 0.5) / 2.5 - there)
    assert "comes back by decoder swap, and 40 % is there without" in judged(table).sentence
    assert judged(table[table["metric"] != SWAP]).verdict == "partly forgotten"
