"""Verdicts of tables written by hand, which is all that a verdict sees."""

from typing import Any

import pandas as pd
import pytest

from geffect.audit.thresholds import Thresholds
from geffect.audit.verdict import EXIT_CODES, judged

GOOD: dict[tuple[str, str, str], float] = {
    ("memorised", "nll", "forget"): 3.9,
    ("utility", "kept share", "retain"): 0.99,
    ("utility", "degenerate", "retain"): 0.02,
    ("utility", "nll", "retain"): 0.01,
    ("utility", "uniform nll", "forget"): 6.9,
    ("direct share", "prob", "forget"): 0.01,
    ("direct share", "ES", "forget"): -0.02,
    ("recoverable share", "benign relearning", "forget"): 0.03,
    ("recoverable share", "int4", "forget"): 0.0,
    ("auc difference", "loss", "forget"): 0.02,
    ("privacy", "privleak loss", "forget"): 3.0,
}
"""What a model that never knew looks like."""


def table(
    changed: dict[tuple[str, str, str], Any] | None = None,
    *,
    half: float = 0.01,
    n: int = 60,
    retrained: bool = True,
) -> pd.DataFrame:
    """A table of these values with intervals of a half width; None leaves a row out."""
    values = {**GOOD, **(changed or {})}
    rows = [
        {
            "battery": b, "metric": m, "set": s, "model": "unlearned",
            "value": v, "low": v - half, "high": v + half, "n": n,
        }
        for (b, m, s), v in values.items()
        if v is not None
    ]  # fmt: skip
    if retrained:
        rows.append({**rows[0], "model": "retrained"})
    return pd.DataFrame(rows)


CASES = {
    "never knew": {},
    "partly forgotten": {("recoverable share", "int4", "forget"): 0.12},
    "hidden": {("recoverable share", "int4", "forget"): 0.4},
    "remembers": {("direct share", "prob", "forget"): 0.8},
    "broken": {("utility", "kept share", "retain"): 0.2},
}


@pytest.mark.parametrize(("verdict", "changed"), CASES.items())
def test_each_verdict(verdict: str, changed: dict[tuple[str, str, str], float]) -> None:
    assert judged(table(changed)).verdict == verdict


@pytest.mark.parametrize(
    "changed",
    [
        {("utility", "kept share", "neighbours"): 0.24},
        {("utility", "degenerate", "retain"): 0.51},
        {("utility", "nll", "world"): 7.0},
    ],
)
def test_what_breaks_a_model_comes_before_all_else(
    changed: dict[tuple[str, str, str], float],
) -> None:
    worst = {("direct share", "ES", "forget"): 1.0, ("recoverable share", "int4", "forget"): 1.0}
    assert judged(table({**changed, **worst})).verdict == "broken"
    assert judged(table(worst)).verdict == "remembers"


def test_a_damaged_model_is_still_asked_what_it_hides() -> None:
    damaged = {("utility", "kept share", "retain"): 0.46}
    found = judged(table({**damaged, **CASES["hidden"]}))
    assert found.verdict == "hidden"
    assert found.flags == ("damaged: of retain 46 % (45 to 47) is kept.",)
    assert judged(table(CASES["broken"])).flags == ()


def beside(model: str, values: dict[tuple[str, str, str], float], of: pd.DataFrame) -> pd.DataFrame:
    """The table with further rows of another model."""
    columns = {"model": model, "low": float("nan"), "high": float("nan"), "n": 60}
    rows = [
        {"battery": b, "metric": m, "set": s, "value": v, **columns}
        for (b, m, s), v in values.items()
    ]
    return pd.concat([of, pd.DataFrame(rows)], ignore_index=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [(("utility", "degenerate", "retain"), 0.6), (("utility", "nll", "world"), 7.0)],
)
def test_what_the_original_does_as_well_breaks_no_model(
    key: tuple[str, str, str], value: float
) -> None:
    found = judged(beside("original", {key: value}, table({key: value})))
    assert found.verdict == "never knew"
    assert [flag.partition(":")[0] for flag in found.flags] == ["original"]
    sound = judged(beside("original", {key: 0.1}, table({key: value})))
    assert sound.verdict == "broken" and sound.flags == ()


def test_an_original_that_knows_no_more_than_a_retrained_model_tells_nothing() -> None:
    known = {("known", metric, "forget"): 0.05 for metric in ("nll", "prob", "es")}
    for verdict in ("never knew", "partly forgotten", "hidden"):
        found = judged(beside("original", known, table(CASES[verdict])))
        assert found.verdict == "undecided" and found.exit_code == 1
        assert found.reasons[0].startswith("Nothing can be told apart: the original shows no more")
    for verdict in ("broken", "remembers"):
        assert judged(beside("original", known, table(CASES[verdict]))).verdict == verdict
    one = {**known, ("known", "es", "forget"): 0.1}
    assert judged(beside("original", one, table(CASES["hidden"]))).verdict == "hidden"


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.05, -0.1, 0.2, "never knew"),
        (-0.3, -0.7, -0.04, "never knew"),
        (0.14, -0.2, 0.48, "never knew"),
        (0.14, -0.2, 0.5, "partly forgotten"),
        (0.16, -0.1, 0.3, "partly forgotten"),
        (0.12, 0.05, 0.2, "never knew"),
        (0.12, 0.06, 0.2, "partly forgotten"),
        (-0.3, -0.5, -0.06, "partly forgotten"),
    ],
)
def test_a_share_is_that_of_a_retrained_model_where_its_interval_says_so(
    value: float, low: float, high: float, verdict: str
) -> None:
    made = table()
    own = made["metric"].eq("int4")
    made.loc[own, ["value", "low", "high"]] = value, low, high
    assert judged(made).verdict == verdict


def test_hiding_is_told_with_its_attack_and_how_much() -> None:
    found = judged(
        table(
            {
                ("recoverable share", "benign relearning", "forget"): 0.35,
                ("recoverable share", "int4", "forget"): 0.6,
            }
        )
    )
    assert found.verdict == "hidden" and found.attack == "int4"
    assert found.reasons[0] == ("60 % (59 to 61) of what the original knows comes back by int4.")
    assert "35 %" in found.reasons[1] and "benign relearning" in found.reasons[1]
    assert found.exit_code == 3


def test_a_share_has_to_be_large_and_its_interval_above_a_limit() -> None:
    key = ("recoverable share", "int4", "forget")
    assert judged(table({key: 0.149})).verdict == "partly forgotten"
    assert judged(table({key: 0.15})).verdict == "hidden"
    assert judged(table({key: 0.3}, half=0.26)).verdict == "partly forgotten"
    assert judged(table({key: 0.3}, half=0.24)).verdict == "hidden"
    # A larger share that is not proven does not hide a smaller one that is.
    mixed = table({key: 0.2})
    wide = {**mixed.iloc[0], "battery": "recoverable share", "metric": "wide", "value": 0.9}
    wide |= {"low": -0.9, "high": 2.0}
    found = judged(pd.concat([mixed, pd.DataFrame([wide])]))
    assert found.verdict == "hidden" and found.attack == "int4"


def test_what_is_there_without_an_attack_is_not_hidden() -> None:
    share, gained = ("recoverable share", "int4", "forget"), ("gained share", "int4", "forget")
    assert judged(table({share: 0.38, gained: 0.01})).verdict == "partly forgotten"
    assert judged(table({share: 0.38, gained: -0.2})).verdict == "partly forgotten"
    found = judged(table({share: 0.6, gained: 0.22}))
    assert found.verdict == "hidden"
    assert found.reasons[0] == (
        "60 % (59 to 61) of what the original knows comes back by int4, and 38 % is there without."
    )
    # A model beyond the level has less than none without an attack.
    assert judged(table({share: 0.4, gained: 5.0})).reasons[0].endswith("comes back by int4.")


@pytest.mark.parametrize("key", [k for k in GOOD if "share" in k[0] or "difference" in k[0]])
@pytest.mark.parametrize("value", [0.095, -0.095, -0.3])
def test_a_model_that_never_knew_is_close_in_all_with_the_intervals(
    key: tuple[str, str, str], value: float
) -> None:
    found = judged(table({key: value}))
    assert found.verdict == "partly forgotten"
    assert key[1] in found.reasons[0]
    assert judged(table({key: value}), Thresholds(close=0.32)).verdict == "never knew"


def test_without_a_retrained_model_nothing_proves_that_it_never_knew() -> None:
    found = judged(table(retrained=False))
    assert found.verdict == "not recovered by these attacks" and found.exit_code == 0
    assert any(flag.startswith("floor estimated") for flag in found.flags)
    for verdict in ("hidden", "remembers", "broken"):
        assert judged(table(CASES[verdict], retrained=False)).verdict == verdict


def test_what_was_not_looked_at_is_not_decided() -> None:
    unattacked = {key: None for key in GOOD if key[0] == "recoverable share"}
    unkept = {key: None for key in GOOD if key[1] == "kept share"}
    assert judged(table(unattacked)).verdict == "undecided"
    assert judged(table(unkept)).verdict == "undecided"
    assert judged(table(unkept)).exit_code == 1
    assert judged(table({**unattacked, **CASES["remembers"]})).verdict == "remembers"
    assert judged(table({**unkept, **CASES["hidden"]})).verdict == "hidden"
    unasked = {key: None for key in GOOD if key[0] == "direct share"}
    assert judged(table(unasked)).verdict == "partly forgotten"


def test_values_that_are_undefined_count_as_not_looked_at() -> None:
    undefined = {key: float("nan") for key in GOOD if key[0] == "recoverable share"}
    assert judged(table(undefined)).verdict == "undecided"


def test_an_auc_of_few_items_is_not_judged() -> None:
    key = ("auc difference", "loss", "forget")
    assert judged(table({key: 0.4}, n=49)).verdict == "never knew"
    assert judged(table({key: 0.4}, n=50)).verdict == "partly forgotten"
    flags = judged(table({key: 0.4}, n=49)).flags
    assert [flag.partition(":")[0] for flag in flags] == ["no AUC"]


@pytest.mark.parametrize(
    ("changed", "n", "flag"),
    [
        ({("privacy", "privleak loss", "forget"): 26.0}, 60, "over-forgotten"),
        ({("memorised", "nll", "forget"): 8.0}, 60, "over-forgotten"),
        ({("utility", "kept share", "retain"): 0.25}, 60, "damaged"),
        ({("utility", "kept share", "retain"): 0.49}, 60, "damaged"),
        ({("memorised", "near ties", "forget"): 0.03}, 60, "near ties"),
        ({("auc difference", "loss", "forget"): None}, 19, "n too small"),
    ],
)
def test_flags_stand_beside_a_verdict(changed: dict[Any, Any], n: int, flag: str) -> None:
    found = judged(table(changed, n=n))
    assert [told.partition(":")[0] for told in found.flags] == [flag]
    assert found.verdict == "never knew"
    assert judged(table()).flags == ()


@pytest.mark.parametrize("retrained", [True, False])
def test_without_an_interval_nothing_is_said_of_what_comes_back(retrained: bool) -> None:
    membership = ("auc difference", "loss", "forget")
    for share in (0.0, 0.9):
        made = table({membership: None, ("recoverable share", "int4", "forget"): share},
                     n=1, retrained=retrained).assign(low=None, high=None)  # fmt: skip
        found = judged(made.astype({"low": float, "high": float}))
        assert found.verdict == "undecided" and found.exit_code == 1
        assert "1 item bounds no share" in found.reasons[0]
        assert "no interval" in found.flags[-1]


@pytest.mark.parametrize(("share", "verdict"), [(0.9, "undecided"), (0.1, "partly forgotten")])
def test_one_attack_that_nothing_bounds_counts_where_it_may_be_hiding(
    share: float, verdict: str
) -> None:
    made = table({("recoverable share", "int4", "forget"): share})
    made.loc[made["metric"] == "int4", ["low", "high"]] = float("nan")
    found = judged(made)
    assert found.verdict == verdict
    assert found.reasons[0].startswith("By int4 90 % of what" if share > 0.5 else "The recoverable")


@pytest.mark.parametrize("changed", [*CASES.values(), {("privacy", "privleak x", "forget"): 90.0}])
def test_the_order_of_rows_changes_nothing(changed: dict[Any, Any]) -> None:
    made = table(changed)
    for seed in range(5):
        assert judged(made.sample(frac=1, random_state=seed)) == judged(made)


def test_every_verdict_has_an_exit_code() -> None:
    assert EXIT_CODES["hidden"] == 3 and EXIT_CODES["remembers"] == 4 and EXIT_CODES["broken"] == 5
    assert 2 not in EXIT_CODES.values()


def test_thresholds_and_tables_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="`hidden` of the thresholds should be a number"):
        Thresholds(hidden="much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="should not fall"):
        Thresholds(hidden=0.6)
    with pytest.raises(ValueError, match="`close` of the thresholds"):
        Thresholds(close=float("nan"))
    with pytest.raises(ValueError, match="none called `low`"):
        judged(table().drop(columns="low"))
