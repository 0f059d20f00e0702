"""What the pictures of an audit are drawn of, and the page that they stand on."""

import re
from dataclasses import asdict

import numpy as np
import pytest

from geffect.audit import panels
from geffect.audit.page import page
from geffect.audit.thresholds import Thresholds
from geffect.audit.words import CALLED, TURNS
from geffect.plots.inks import inks
from tests.utils.audit_reports import ROWS, SHARES, report, table


def test_shares_are_those_of_the_model_audited_and_the_noise_of_others() -> None:
    found = panels.shares(table())
    assert found[["label", "model", "value"]].to_numpy().tolist() == [
        ["extraction strength", "unlearned", 0.2],
        ["int4 <b>", "unlearned", 0.5], ["int4 <b>", "retrained", 0.1],
    ]  # fmt: skip
    assert panels.shares(table([row for row in ROWS if "share" not in row[0]])).empty
    assert panels.shares(table([row for row in ROWS if row[3] != "unlearned"])).empty


def test_two_shares_of_one_name_are_told_apart_by_their_battery() -> None:
    twice = [*ROWS, ("recoverable share", "es", "forget", "unlearned", 0.3)]
    labels = panels.shares(table(twice))["label"].tolist()
    assert labels[0] == "extraction strength, direct share"
    assert "extraction strength, recoverable share" in labels


def test_a_page_says_what_of_the_nll_is_there_before_an_attack() -> None:
    """Else a share of the NLL under an attack that does nothing reads as if that brought it."""
    known = [("memorised", "nll", "forget", "original", 1.0)]
    rows = [*SHARES, *(r for r in ROWS if r[:3] == known[0][:3] and r[3] != "original")]
    nll = {row[3]: row[4] for row in [*rows, *known] if row[:3] == known[0][:3]}
    there = (nll["retrained"] - nll["unlearned"]) / (nll["retrained"] - nll["original"])
    said = f"{100 * there:.0f}\u00a0% is there without an attack"
    assert said in page(report([*rows, *known]))
    assert "without an attack" not in page(report(rows))


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
    for word in ("hidden", "remembers", "block, from input to output", "step of further training",
                 "score from 0 to 1"):  # fmt: skip
        assert re.search(rf"<text[^>]*>\s*{word}", text), word
    assert not re.search(r"<text[^>]*>\s*value<", text), "Every axis says of what it is."


def test_a_picture_calls_metrics_by_words_and_the_page_defines_them() -> None:
    batteries = {"rounding": "recoverable share"}
    measured = [
        (batteries.get(name.split()[0], "memorised"), name, "forget", "unlearned", 0.5)
        for name in CALLED
    ]
    aucs = ("AUC loss", "AUC min_k_0.2", "AUC min_k_pp_0.4")
    measured += [("privacy", name, "forget", "unlearned", 0.5) for name in aucs]
    text = page(report(measured))
    labels = re.findall(r"<title>unlearned, ([^<]*): 0.5</title>", text)
    assert {*labels} == {*CALLED.values(), "loss", "Min-K% (K = 20)", "Min-K%++ (K = 40)"}
    defined = {*re.findall(r'<dt id="word-([^"]*)"', text)}
    assert {*re.findall(r'href="#word-([^"]*)"', text)} <= defined


def test_names_in_a_reason_are_code() -> None:
    told = report(SHARES)
    told.manifest["skipped"] = {"recognition": "`forget` has no <wrong> answers."}
    assert "<code>forget</code> has no &lt;wrong&gt; answers." in page(told)


def test_a_page_says_in_words_where_the_verdict_turns() -> None:
    told = report(SHARES)
    told.manifest["thresholds"] = asdict(Thresholds())
    rows = re.findall(r'<td class="says">([^<]*)</td><td class="number">([^<]*)</td>', page(told))
    assert [row[1] for row in rows] == [f"{x:g}" for x in asdict(Thresholds()).values()]
    assert ("hidden: an attack brings back this share or more", "0.15") in rows
    assert TURNS.keys() == asdict(Thresholds()).keys()


def test_a_battery_that_was_not_measured_has_no_picture() -> None:
    text = page(report([row for row in ROWS if row[0] == "utility"]))
    assert re.findall(r"<h2[^>]*>([^<]*)<.*\n<figure><svg", text) == ["What stays"]


def test_of_several_retrained_models_each_has_the_mark_of_retrained() -> None:
    text = page(report(SHARES, roles=("original", "retrained 1", "retrained 12", "unlearned")))
    marks = dict(re.findall(r"<td>(<span[^<]*</span>) ([^<]*)</td>", text))
    by_role = {role: mark for mark, role in marks.items()}
    mark = by_role["retrained 12"]
    assert inks(["retrained"])["retrained"].colour in mark and "○" in mark


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_have_no_mark(value: float) -> None:
    rows = [*SHARES, ("recoverable share", "int8", "forget", "unlearned", value)]
    assert "int8" not in panels.shares(table(rows))["label"].tolist()
    assert page(report(rows))
