"""Which facts came back, beside a loop over facts, and what the page says of them."""

import numpy as np
import pandas as pd
import pytest

from geffect.audit.came_back import BACK, shares_of_facts
from geffect.audit.page import LISTED, page
from geffect.audit.table import per_item
from geffect.audit.verdict import TOLD_APART
from tests.utils.audit_reports import SHARES, report

INT4, NLL = ("hidden", "rounding to int4"), ("memorised", "nll")
SHOWN, RECOGNISED = ("hidden", "recognition, retain shown for 20 steps"), ("hidden", "recognition")
SUBJECTS = [f"person {number % 7}" for number in range(40)]


def made(asked: tuple[str, str], attacked: tuple[str, str], scale: float) -> pd.DataFrame:
    """Random values of 40 facts and, of the original, of a holdout; some facts lack one."""
    drawn = np.random.default_rng(0).random((6, 40)) * scale
    drawn[2, 3] = np.nan
    rows = [
        (*asked, "forget", "unlearned", drawn[0]), (*attacked, "forget", "unlearned", drawn[1]),
        (*attacked, "forget", "retrained", drawn[2]), (*asked, "forget", "original", drawn[3]),
        (*attacked, "holdout", "original", drawn[4]), (*asked, "forget", "retrained", drawn[5]),
    ]  # fmt: skip
    return pd.concat([per_item(*row, SUBJECTS) for row in rows], ignore_index=True)


def naive(
    items: pd.DataFrame, asked: tuple[str, str], attacked: tuple[str, str]
) -> dict[int, float]:
    rows = items.to_dict("records")

    def value(of: tuple[str, str], model: str, item: int, part: str = "forget") -> float:
        (row,) = (
            row for row in rows
            if (row["battery"], row["metric"]) == of
            and (row["model"], row["item"], row["set"]) == (model, item, part)
        )  # fmt: skip
        return float(row["value"])

    sign = 1 if asked == RECOGNISED else -1
    has_retrained = (items["model"] == "retrained").any()
    if not has_retrained:
        holdout = sum(value(attacked, "original", item, "holdout") for item in range(40)) / 40
    found = {}
    for item in range(40):
        floor = value(attacked, "retrained", item) if has_retrained else holdout
        known = value(asked, "original", item)
        if sign * (known - floor) >= TOLD_APART:
            found[item] = (value(attacked, "unlearned", item) - floor) / (known - floor)
    return found


@pytest.mark.parametrize(
    ("asked", "attacked", "scale"), [(NLL, INT4, 8.0), (RECOGNISED, SHOWN, 1.0)]
)
@pytest.mark.parametrize("has_retrained", [True, False])
def test_shares_are_those_of_a_loop_over_facts(
    asked: tuple[str, str], attacked: tuple[str, str], scale: float, has_retrained: bool
) -> None:
    items = made(asked, attacked, scale)
    if not has_retrained:
        items = items[items["model"] != "retrained"]
    found = shares_of_facts(items, attacked[1])
    expected = naive(items, asked, attacked)
    assert 5 < len(expected) < 40
    assert dict(zip(found["item"], found["share"], strict=True)) == pytest.approx(expected)
    assert found["share"].is_monotonic_decreasing
    assert [SUBJECTS[item] for item in found["item"]] == found["subject"].tolist()


@pytest.mark.parametrize("attack", ["rounding to int9", "prompt shots of forget", "nll"])
def test_what_was_not_attacked_or_is_not_judged_is_refused(attack: str) -> None:
    with pytest.raises(ValueError, match="one of the recoverable shares"):
        shares_of_facts(made(NLL, INT4, 8.0), attack)


def page_of(items: pd.DataFrame) -> str:
    told = report(SHARES)
    told.judgement.attack = INT4[1]
    told.items = items
    told.texts = {item: (f"question {item}?", f"answer {item}") for item in range(40)}
    return page(told)


def test_the_page_lists_the_facts_that_came_back_and_no_other() -> None:
    items = made(NLL, INT4, 8.0)
    items.loc[(items["metric"] == INT4[1]) & (items["model"] == "unlearned"), "value"] /= 2
    shares = shares_of_facts(items, INT4[1])
    back = shares.loc[shares["share"] > BACK, "item"].tolist()
    assert LISTED < len(back) < len(shares)
    text = page_of(items)
    listed = [item for item in range(40) if f"<td>question {item}?</td>" in text]
    assert listed == sorted(back[:LISTED])
    assert f"{len(back)} of {len(shares)} facts came back by rounding to int4" in text


def test_the_page_says_where_no_fact_came_back() -> None:
    items = made(NLL, INT4, 8.0)
    attacked = (items["metric"] == INT4[1]) & (items["model"] == "unlearned")
    items.loc[attacked, "value"] = 9.0
    text = page_of(items)
    assert "None of " in text and "facts came back by rounding to int4" in text
    assert "question" not in text.split("What came back most</h2>")[1].split("<h2")[0]
