"""Claims follow the numbers: the same sentence holds or not, and says where not."""

import json
from typing import Any

import pandas as pd
import pytest

from geffect.demo.findings import as_markdown, equal_forgetting, findings

RETAIN = {"plain": 1.0, "gru": 0.5, "gru-update": 0.2, "gru-coordinate": 0.05, "select": 0.02}
VIOLATING = {"plain": 0.9, "gru": 0.6, "select": 0.7}


def run(method: str, variant: str, seed: int, **changed: Any) -> dict[str, Any]:
    """A run as the literature would have it."""
    retain = changed.pop("retain", RETAIN[variant])
    return {
        "method": method,
        "variant": variant,
        "seed": seed,
        "learning_rate": 3e-4,
        "steps": 20,
        "reached_level": True,
        "at_level": {
            "step": 17.5,
            "retain_nll": retain,
            "retain_heldout_authors_nll": 1.5 * retain,
            "relearn_nll": [1.0, 2.0],
        },
        "share_retaining_negative": 0.95,
        "share_appreciable_retaining_negative": 1.0,
        "retaining_lowest": {"ga": -300.0, "wga": -9.0, "npo": -45.0}[method],
        "retaining_last": {"ga": -300.0, "wga": -4.0, "npo": -5.0}[method],
        "share_update_violating": VIOLATING.get(variant, 0.0),
        **changed,
    }


def study(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Three methods, two seeds, every variant; `changed` by "method variant seed"."""
    return [
        run(method, variant, seed, **changed.get(f"{method} {variant} {seed}", {}))
        for method in ("ga", "wga", "npo")
        for variant in RETAIN
        for seed in (0, 1)
    ]


def finding(runs: list[dict[str, Any]], words: str) -> dict[str, Any]:
    (found,) = [f for f in findings(runs) if words in f["claim"]]
    return found


def test_all_claims_hold_where_the_numbers_say_so() -> None:
    said = findings(study())
    assert len(said) == 13
    assert [f["claim"] for f in said if not f["holds"]] == []


@pytest.mark.parametrize(
    ("words", "changed", "exceptions"),
    [
        ("reached the gold level",
         {"npo select 1": {"reached_level": False, "at_level": None}}, ["npo-select-seed1"]),
        ("GA harms", {"ga plain 1": {"share_appreciable_retaining_negative": 0.9}}, ["seed 1"]),
        ("WGA is milder", {"wga plain 0": {"retaining_lowest": -301.0}}, ["seed 0"]),
        ("NPO limits itself", {"npo plain 1": {"retaining_last": -45.0}}, ["seed 1"]),
        ("at least 1.3 times", {"wga gru 1": {"retain": 0.8}}, ["wga seed 1"]),
        ("gru-update keeps a lower retain NLL than",
         {"npo gru-update 0": {"retain": 1.1}}, ["npo"]),
        ("select keeps a lower retain NLL, authors outside",
         {"ga select 0": {"retain": 3.0}}, ["ga"]),
        ("no applied update", {"ga gru-update 0": {"share_update_violating": 0.1}}, ["gru-update"]),
    ],
)  # fmt: skip
def test_a_claim_that_fails_says_where(
    words: str, changed: dict[str, Any], exceptions: list[str]
) -> None:
    found = finding(study(**changed), words)
    assert not found["holds"]
    assert found["except"] == exceptions


def test_a_run_short_of_the_level_is_an_exception_wherever_it_is_compared() -> None:
    runs = study(**{"ga gru 1": {"reached_level": False, "at_level": None}})
    assert finding(runs, "at least 1.3 times")["except"] == ["ga seed 1"]
    assert finding(runs, "gru-update keeps a lower retain NLL than")["except"] == ["ga"]
    assert finding(runs, "select keeps a lower retain NLL than")["except"] == ["ga"]
    assert "NaN" not in json.dumps(findings(runs))


def test_nothing_is_claimed_of_what_was_not_run() -> None:
    only = [r for r in study() if r["method"] == "npo" and r["variant"] in ("plain", "gru")]
    claims = [f["claim"] for f in findings(only)]
    assert len(claims) == 2
    assert "for NPO, in every seed" in claims[1]
    assert not any(words in claim for claim in claims for words in ("select", "GA,", "WGA"))


def test_the_table_holds_every_run_and_the_gold_models() -> None:
    gold = {str(seed): {"retain_nll": 0.01, "relearn_nll": [2.0, 4.0]} for seed in (0, 1)}
    table = equal_forgetting({"runs": study(), "gold": gold})
    assert len(table) == 32
    assert set(table[table["method"] == "gold"]["relearn_nll"]) == {3.0}
    assert table["step"].dropna().eq(17.5).all()


def test_the_printed_table_has_the_means_over_seeds() -> None:
    numbers = {
        name: [1.0, 3.0]
        for name in ("step", "retain_nll", "retain_heldout_authors_nll", "world_nll", "forget_es",
                     "forget_paraphrase_nll", "relearn_nll", "share_update_violating",
                     "learning_rate")
    }  # fmt: skip
    table = pd.DataFrame({"method": "ga", "variant": "gru", "seed": [0, 1], **numbers})
    header, rule, row = as_markdown(table).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 12
    assert "2.000" in row
