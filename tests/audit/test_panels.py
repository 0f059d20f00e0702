"""What the pictures of an audit are drawn of, and the page that they stand on."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect.audit import panels
from geffect.audit.page import page
from geffect.audit.table import SUMMED
from geffect.plots.inks import inks

Row = tuple[str, str, str, str, float]

ROWS: list[Row] = [
    ("direct share", "es", "forget", "unlearned", 0.2),
    ("recoverable share", "int4 <b>", "forget", "unlearned", 0.5),
    ("recoverable share", "int4 <b>", "forget", "retrained", 0.1),
    ("memorised", "es", "forget", "original", 0.9),
    ("memorised", "es", "retain", "original", 0.8),
    ("memorised", "nll", "forget", "unlearned", 4.0),
    ("memorised", "nll", "forget", "retrained", 3.0),
    ("memorised", "nll", "forget", "original", 0.1),
    ("hidden", "relearning benign, 8 steps, rate x 1", "forget", "unlearned", 1.0),
    ("hidden", "relearning benign, 1 step, rate x 1", "forget", "unlearned", 2.5),
    ("hidden", "relearning benign, 8 steps, rate x 2", "forget", "unlearned", 0.5),
    ("hidden", "relearning benign, 8 steps, rate x 1", "forget", "retrained", 2.9),
    ("depth", "patched 1", "forget", "unlearned", 0.7),
    ("depth", "patched 0", "forget", "unlearned", 0.2),
    ("depth", "lens 0", "forget", "unlearned", 9.0),
    ("depth", "patched 0", "forget", "original", float("nan")),
    ("privacy", "AUC loss", "forget", "unlearned", 0.6),
    ("utility", "es", "retain", "unlearned", 0.4),
    ("utility", "es", "world", "unlearned", 0.3),
]


def table(rows: list[Row] = ROWS) -> pd.DataFrame:
    return pd.DataFrame(
        [(*row, row[-1] - 0.05, row[-1] + 0.05, 20) for row in rows], columns=[*SUMMED]
    )


def report(rows: list[Row] = ROWS, roles: tuple[str, ...] = ("original", "unlearned")) -> Any:
    model = {"name": "m", "kind": "k", "class": "c", "dtype": ["float32"]}
    judgement = SimpleNamespace(
        verdict="hidden", reasons=("why",), flags=(), attack=None, exit_code=3
    )
    manifest = {
        "roles": {role: role for role in roles}, "models": dict.fromkeys(roles, model),
        "skipped": {}, "sets": {}, "thresholds": {"hidden": 0.25, "remembers": 0.5}, "seconds": 1,
        "budget": {"name": "quick"}, "learning_rate": {"value": 1e-3, "given": True},
    }  # fmt: skip
    items = pd.DataFrame()
    return SimpleNamespace(
        judgement=judgement,
        table=table(rows),
        items=items,
        manifest=manifest,
        texts={},
        geometry=None,
        controls=None,
    )


def test_shares_are_those_of_the_model_audited_and_the_noise_of_others() -> None:
    found = panels.shares(table())
    assert found[["label", "model", "value"]].to_numpy().tolist() == [
        ["es", "unlearned", 0.2], ["int4 <b>", "unlearned", 0.5], ["int4 <b>", "retrained", 0.1],
    ]  # fmt: skip
    assert panels.shares(table([row for row in ROWS if "share" not in row[0]])).empty
    assert panels.shares(table([row for row in ROWS if row[3] != "unlearned"])).empty


def test_two_shares_of_one_name_are_told_apart_by_their_battery() -> None:
    twice = [*ROWS, ("recoverable share", "es", "forget", "unlearned", 0.3)]
    labels = panels.shares(table(twice))["label"].tolist()
    assert labels[0] == "es, direct share" and "es, recoverable share" in labels


def test_relearning_begins_at_the_model_and_is_of_the_first_rate() -> None:
    found = panels.relearning(table())
    assert found[["model", "step", "value"]].to_numpy().tolist() == [
        ["retrained", 0, 3.0], ["retrained", 8, 2.9],
        ["unlearned", 0, 4.0], ["unlearned", 1, 2.5], ["unlearned", 8, 1.0],
    ]  # fmt: skip


def test_depth_is_of_what_was_patched_in_order_and_known() -> None:
    found = panels.depth(table())
    assert found[["model", "block", "value"]].to_numpy().tolist() == [
        ["unlearned", 0, 0.2], ["unlearned", 1, 0.7],
    ]  # fmt: skip


def test_metrics_are_of_a_set_or_called_by_theirs() -> None:
    asked = panels.measured(table(), "memorised", ("es",), of="forget")
    assert asked["value"].tolist() == [0.9]
    kept = panels.measured(table(), "utility", ("es",), label="set")
    assert kept["label"].tolist() == ["retain", "world"]


def test_a_page_has_a_picture_of_each_battery_with_its_marks() -> None:
    text = page(report())
    pictures = re.findall(r"<h2[^>]*>([^<]*)<.*\n<figure><svg", text)
    assert pictures == [
        "What is there, and what comes back", "Asked directly", "Relearning", "Depth",
        "Membership", "What stays",
    ]  # fmt: skip
    assert "http" not in text and "<b>)" not in text
    for said in ("unlearned, int4 &lt;b&gt;: 0.5", "retrained, int4 &lt;b&gt;: 0.1"):
        assert f"<title>{said}</title>" in text
    for word in ("hidden", "remembers", "block, from input to output", "step of further training"):
        assert re.search(rf"<text[^>]*>\s*{word}", text), word


def test_a_battery_that_was_not_measured_has_no_picture() -> None:
    text = page(report([row for row in ROWS if row[0] == "utility"]))
    assert re.findall(r"<h2[^>]*>([^<]*)<.*\n<figure><svg", text) == ["What stays"]


def test_of_several_retrained_models_each_has_the_mark_of_retrained() -> None:
    text = page(report(roles=("original", "retrained 1", "retrained 12", "unlearned")))
    marks = dict(re.findall(r"<td>(<span[^<]*</span>) ([^<]*)</td>", text))
    by_role = {role: mark for mark, role in marks.items()}
    mark = by_role["retrained 12"]
    assert inks(["retrained"])["retrained"].colour in mark and "○" in mark


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_have_no_mark(value: float) -> None:
    rows = [*ROWS, ("recoverable share", "int8", "forget", "unlearned", value)]
    assert "int8" not in panels.shares(table(rows))["label"].tolist()
    assert page(report(rows))
