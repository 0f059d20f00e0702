"""Claims follow the numbers: the same sentence holds or not, and says where not. So do tables."""

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import cosine
from geffect.demo import figures
from geffect.demo.claims import OUTSIDE
from geffect.demo.config import LEVELS
from geffect.demo.findings import findings, shares
from geffect.demo.hiding import HIDING
from geffect.demo.methods import EQUAL, FEW, HIDES, RATES, SETS, VARIANTS
from geffect.demo.plan import IN_A_LOOK, Plan
from geffect.demo.tables import (
    TABLES,
    as_markdown,
    columns_of,
    compared,
    learning_rates,
    retain_sets,
    write_tables,
)
from geffect.report import study_report
from tests.utils import shallow
from tests.utils.rectified import losses_of

RETAIN = {
    "plain": 1.0, "gru": 0.5, "gru-update": 0.2, "gru-coordinate": 0.05, "select": 0.02,
    "sago": 0.03,
}  # fmt: skip
TWO_SETS = {
    "gru-world": (0.9, 0.02), "nearest": (0.4, 0.03),
    "gru-world-update": (0.8, 0.01), "nearest-update": (0.1, 0.02),
}  # fmt: skip
VIOLATING = {"plain": 0.9, "gru": 0.6, "select": 0.7, "gru-world": 0.5, "nearest": 0.4}
GOLD = {"retain_nll": 0.01, "forget_es": 0.2}


def run(method: str, variant: str, seed: int, **changed: Any) -> dict[str, Any]:
    """A run as the literature would have it."""
    retain = changed.pop("retain", RETAIN.get(variant, 0.0))
    world = changed.pop("world", 0.1 * retain)
    measured = {
        "retain_nll": retain,
        "retain_heldout_authors_nll": 1.5 * retain,
        "world_nll": world,
        "forget_nll": 3.4,
        "forget_es": 0.3,
        "forget_paraphrase_nll": 3.3,
        "relearn_nll": [1.0, 2.0],
    }
    return {
        "part": EQUAL,
        "retain_feed": 140,
        "method": method,
        "variant": variant,
        "seed": seed,
        "learning_rate": 3e-4,
        "steps": 20,
        "reached_level": True,
        "at_level": {"step": 17.5, **measured},
        "at_value": {"step": 22.5, **measured},
        "at_es": {"step": 27.5, **measured},
        "share_retaining_negative": 0.95,
        "share_appreciable_retaining_negative": 1.0,
        "retaining_lowest": {"wga": -9.0, "npo": -45.0}.get(method, -300.0),
        "retaining_last": {"wga": -4.0, "npo": -5.0}.get(method, -300.0),
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


def controls(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    """GA with few facts that feed, at two more learning rates, and with two retain sets."""
    settings: list[tuple[str, dict[str, Any]]] = [
        *[(v, {"part": FEW, "retain_feed": 30}) for v in RETAIN],
        *[
            (v, {"part": RATES, "learning_rate": rate, "retain": factor * RETAIN[v]})
            for v in RETAIN
            for rate, factor in ((1.5e-4, 0.9), (6e-4, 2.0))
        ],
        *[(v, {"part": SETS, "retain": r, "world": w}) for v, (r, w) in TWO_SETS.items()],
    ]
    return [
        run("ga", v, seed, **setting | changed.get(f"{setting['part']} {v} {seed}", {}))
        for v, setting in settings
        for seed in (0, 1)
    ]


def planned(plan: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two seeds of every cell of a plan: those that it compares, and their controls."""
    size = plan.studied.corpus
    runs = []
    for cell, seed in product(plan.specs(), (0, 1)):
        retain, world = TWO_SETS.get(cell.variant, (RETAIN.get(cell.variant, 0.04), 0.01))
        made = run(
            cell.method,
            cell.variant,
            seed,
            part=cell.part,
            learning_rate=cell.learning_rate,
            retain_feed=10 * (size.authors - size.forget - cell.heldout),
            retain=2 * retain if cell.part == RATES else retain,
            world=world if cell.part == SETS else 0.1 * retain,
        )
        missing = {at: None for name, at in LEVELS.items() if name not in plan.levels(cell)}
        runs.append(made | missing)
    return (
        [r for r in runs if r["part"] == EQUAL],
        [r for r in runs if r["part"] != EQUAL],
    )


def summary(**changed: dict[str, Any]) -> dict[str, Any]:
    gold = {
        str(seed): {
            **GOLD,
            "relearn_nll": [2.0, 4.0],
            "by_feed": {"140": GOLD, "30": GOLD | {"retain_nll": 0.02}},
        }
        for seed in (0, 1)
    }
    hiding = [run("ga", "name-rows", seed, part=HIDES) for seed in (0, 1)]
    further = [*controls(**changed), *hiding]
    return {"runs": study(**changed), "further_runs": further, "gold": gold}


def edits() -> list[dict[str, Any]]:
    """An edit of two seeds, one of which does not reach the level."""
    made = [run("mix", "edit", seed, learning_rate=None, steps=None) for seed in (0, 1)]
    for edit in made:
        edit |= {"at_disruption": edit["at_level"] | {"step": None, "retain_nll": 0.9}}
        edit |= {"before": {"retain_nll": 0.8}, "share_update_violating": None}
    made[1] |= {"reached_level": False, "at_level": None, "highest_forget_nll": 2.5}
    return made


def look() -> dict[str, Any]:
    """A summary of runs that end at equal forgetting, without controls."""
    short = {"at_es": None, "at_value": None}
    return summary() | {"runs": [r | short for r in study()], "further_runs": []}


def finding(
    runs: list[dict[str, Any]], words: str, further: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    (found,) = [f for f in findings(runs, further or []) if words in f["claim"]]
    return found


def test_all_claims_hold_where_the_numbers_say_so() -> None:
    said = findings(study(), controls())
    assert len(said) == 19
    assert [f["claim"] for f in said if not f["holds"]] == []


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_every_plan_has_its_claims(every: bool, controlled: bool) -> None:
    plan = Plan(all_variants=every, controls=controlled)
    runs, further = planned(plan)
    said = findings(runs, further)
    assert [f["claim"] for f in said if not f["holds"]] == []
    assert said[0]["numbers"] == {"runs": 2 * len(plan.specs())}
    # With few retain facts and many, at two levels, and in the comparison at the best rates.
    sago = (5 if controlled else 2) if every else 0
    assert sum("SAGO" in f["claim"] for f in said) == sago
    rates = [f for f in said if "best of its learning rates" in f["claim"]]
    assert len(rates) == controlled
    for found in rates:
        assert "falls from plain to gru, from gru to gru-update" in found["claim"]
        (best,) = found["numbers"]["lowest_means"].values()
        assert best.keys() == set(VARIANTS if every else IN_A_LOOK)
        assert best["gru"] == pytest.approx(1.5 * RETAIN["gru"])


def test_what_falls_is_said_of_the_variants_that_were_run_at_several_rates() -> None:
    def claims(*variants: str) -> list[str]:
        chosen = {name: VARIANTS[name] for name in variants}
        said = findings(*planned(Plan(all_variants=True, controls=True, variants=chosen)))
        return [f["claim"] for f in said if "best of its learning rates" in f["claim"]]

    assert claims("plain") == claims("gru-coordinate") == []
    (claim,) = claims("plain", "gru")
    assert " falls from plain to gru, on the mean" in claim
    (claim,) = claims("sago", "select", "gru-update")
    assert " falls from SAGO to the best of coordinate and selective steps, on" in claim


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
        ("select keeps a lower retain NLL of authors outside",
         {"ga select 0": {"retain": 3.0}}, ["ga"]),
        ("no applied update", {"ga gru-update 0": {"share_update_violating": 0.1}}, ["gru-update"]),
        ("equal forgetting, with 140 QA", {"npo select 0": {"retain": 0.9}}, ["npo"]),
        ("equal extraction strength, with 140 QA",
         {"npo sago 0": {"retain": 1e-3}, "npo sago 1": {"retain": 1e-3}}, ["npo"]),
    ],
)  # fmt: skip
def test_a_claim_that_fails_says_where(
    words: str, changed: dict[str, Any], exceptions: list[str]
) -> None:
    found = finding(study(**changed), words)
    assert not found["holds"]
    assert found["except"] == exceptions


@pytest.mark.parametrize(
    ("words", "changed", "exceptions"),
    [
        ("reached the gold level",
         {f"{FEW} gru 1": {"reached_level": False, "at_level": None},
          f"{RATES} select 0": {"reached_level": False, "at_level": None}},
         ["ga-gru-seed1 with 30 QA at learning rate 0.0003",
          "ga-select-seed0 with 140 QA at learning rate 0.00015",
          "ga-select-seed0 with 140 QA at learning rate 0.0006"]),
        ("forgetting, with 30 QA",
         {f"{FEW} sago {seed}": {"retain": 0.01} for seed in (0, 1)}, ["ga"]),
        ("best of its learning rates",
         {f"{RATES} plain 0": {"retain": 0.01}, f"{RATES} plain 1": {"retain": 0.01}},
         ["ga, 140 QA: gru"]),
        ("`nearest`", {f"{SETS} nearest 0": {"world": 0.5}},
         ["ga, gradient space: world facts NLL"]),
        ("`nearest`", {f"{SETS} nearest-update 0": {"retain": 2.0}},
         ["ga, update space: retain NLL"]),
        ("no applied update",
         {f"{SETS} nearest-update 0": {"share_update_violating": 0.1}}, ["nearest-update"]),
        ("no applied update",
         {f"{SETS} gru-world-update 0": {"share_update_violating": 0.1}}, ["gru-world-update"]),
    ],
)  # fmt: skip
def test_a_claim_about_the_controls_that_fails_says_where(
    words: str, changed: dict[str, Any], exceptions: list[str]
) -> None:
    assert finding(study(), words, controls())["holds"]
    found = finding(study(), words, controls(**changed))
    assert (found["holds"], found["except"]) == (False, exceptions)


def test_a_variant_that_missed_the_level_is_not_the_best_of_them() -> None:
    missed = {"at_level": None, "reached_level": False}
    assert finding(study(), "forgetting, with 140 QA")["holds"]
    runs = study(**{"ga select 1": missed})
    assert finding(runs, "forgetting, with 140 QA")["except"] == ["ga"]
    runs = study(**{"ga select 1": missed, "ga gru-coordinate 0": {"retain": 0.0}})
    assert finding(runs, "forgetting, with 140 QA")["holds"]


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
    assert "for npo, in every seed" in claims[1]
    assert not any(words in claim for claim in claims for words in ("select", "ga,", "wga"))


def test_the_table_holds_every_run_and_the_gold_models() -> None:
    table = compared(summary(), "at_level", EQUAL)
    assert len(table) == 38
    assert set(table[table["method"] == "gold"]["relearn_nll"]) == {3.0}
    assert table["step"].dropna().eq(17.5).all()


def test_both_feeds_are_compared_at_both_levels() -> None:
    for at, step in (("at_level", 17.5), ("at_es", 27.5)):
        table = compared(summary(), at, EQUAL, FEW)
        assert table["step"].dropna().eq(step).all()
        feeds = table.groupby(["method", "retain_feed"])["seed"].count()
        assert feeds["ga"].to_dict() == {30: 12, 140: 12}
        gold = table[table["method"] == "gold"].groupby("retain_feed")["retain_nll"].mean()
        assert gold.to_dict() == {30: 0.02, 140: 0.01}


def test_learning_rates_stand_in_order() -> None:
    table = learning_rates(summary())
    runs = table[table["method"] != "gold"]
    assert set(runs["method"]) == {"ga"}
    for _, part in runs.groupby(["variant", "seed"]):
        assert part["learning_rate"].tolist() == [1.5e-4, 3e-4, 6e-4]


def test_retain_sets_are_beside_variants_that_know_one() -> None:
    table = retain_sets(summary())
    known = ["plain", "gru", "gru-update", *TWO_SETS]
    assert table["variant"].drop_duplicates().tolist() == [*known, "retrained"]
    assert set(table["method"]) == {"ga", "gold"}


def test_only_tables_that_have_runs_are_written(tmp_path: Path) -> None:
    write_tables(summary(), tmp_path)
    names = [
        "controls_that_hide", "equal_extraction", "equal_forgetting", "equal_values",
        "learning_rates", "retain_sets",
    ]  # fmt: skip
    files = sorted(f"{name}.{kind}" for name in names for kind in ("csv", "md"))
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    alone = tmp_path / "alone"
    alone.mkdir()
    write_tables(look(), alone)
    assert sorted(p.name for p in alone.iterdir()) == [
        "equal_forgetting.csv",
        "equal_forgetting.md",
    ]


def test_the_printed_table_has_the_means_over_the_seeds_that_reached_the_level() -> None:
    missed = {"ga gru 1": {"at_level": None, "reached_level": False}}
    lines = as_markdown(compared(summary(**missed), "at_level", EQUAL)).splitlines()
    assert {line.count("|") for line in lines} == {14}
    (gru,) = [line for line in lines if line.startswith("| ga ") and "| gru " in line]
    assert "17 (1 of 2 seeds)" in gru or "18 (1 of 2 seeds)" in gru
    assert " 0.500 | 0.750 |" in " ".join(gru.split())
    (plain,) = [line for line in lines if line.startswith("| npo ") and "| plain " in line]
    assert "seeds" not in plain
    assert lines[-1].split("|")[1:4] == [
        f" {x} " for x in ("gold  ", "retrained     ", "      140")
    ]
    assert pd.isna(compared(summary(**missed), "at_level", EQUAL)["step"]).sum() == 3


def test_a_table_without_a_run_at_its_level_says_so(tmp_path: Path) -> None:
    missed = [r | dict.fromkeys(LEVELS.values()) for r in study()]
    write_tables(look() | {"runs": missed}, tmp_path)
    printed = (tmp_path / "equal_forgetting.md").read_text(encoding="utf-8")
    assert printed.count("(0 of 2 seeds)") == 3 * len(RETAIN)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], str]]:
    """The report of a summary, without figures."""
    said = {
        "format": 1,
        "versions": {},
        "seeds": [0, 1],
        "config": {
            "subject": "A model.", "recipe": {"corpus": {"forget": 1, "heldout": 2}}, "ema": 0.2,
            "batch": {"forget": 1, "retain": 1}, "variants": {},
        },
        "wall_seconds": {"total": 1.0, "stages": {}},
        "findings": [],
    }  # fmt: skip
    out = tmp_path_factory.mktemp("study")
    with patch.object(figures, "names", lambda *_: []):
        yield lambda summary: study_report(said | {"original": summary["gold"]} | summary, out)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A summary that has every table."""
    return summary() | {"edits": edits()}


@pytest.fixture(scope="module")
def further(
    page: Callable[[dict[str, Any]], str], whole: dict[str, Any]
) -> dict[str, list[list[str]]]:
    """What a report shows of it."""
    return shown(page(whole))


def shown(page: str) -> dict[str, list[list[str]]]:
    """The cells of every further table of a report, row by row, by its heading."""
    found = {}
    for section in re.findall(r"<details>(.*?)</details>", page, re.DOTALL):
        heading, table = re.findall(r"<summary>(.*?)</summary>(.*)", section, re.DOTALL)[0]
        rows = re.findall(r"<tr.*?>(.*?)</tr>", table, re.DOTALL)
        found[heading] = [re.findall(r"<t[hd].*?>([^<]*)", row) for row in rows]
    return found


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("equal_values", ["ga", "gru", "140", "0.0003", "22", "0.500", "0.750"]),
        ("controls_that_hide", ["ga", "name-rows", "140", "0.0003", "18"]),
        ("equal_extraction", ["ga", "gru", "30", "0.0003", "28", "0.500", "0.750"]),
        ("learning_rates", ["ga", "gru", "140", "0.0006", "18", "1.000", "1.500"]),
        ("retain_sets", ["ga", "nearest", "140", "0.0003", "18", "0.400", "0.600", "0.030"]),
        ("before_edits", ["mix", "other model", "140", "&ndash;", "&ndash;", "0.800"]),
        ("equal_disruption", ["mix", "edit", "140", "&ndash;", "&ndash;", "0.900", "0.000"]),
    ],
)
def test_a_report_shows_every_further_table(
    whole: dict[str, Any], further: dict[str, list[list[str]]], name: str, row: list[str]
) -> None:
    heading, of = TABLES[name]
    assert list(further) == [heading for heading, _ in list(TABLES.values())[1:]]
    titles, *rows = further[heading]
    assert titles[:6] == [
        "method", "variant", "retain QA", "learning rate", "steps", "retain NLL inside"
    ]  # fmt: skip
    assert {len(cells) for cells in rows} == {len(titles)}
    assert row in [cells[: len(row)] for cells in rows]
    keys = ["method", "variant", "retain_feed", "learning_rate"]
    made = of(whole)
    assert len(rows) == made.groupby(keys, dropna=False).ngroups + made["retain_feed"].nunique()


def test_a_report_without_further_tables_has_no_sections_of_them(
    page: Callable[[dict[str, Any]], str],
) -> None:
    text = page(look())
    (main, _), *further = TABLES.values()
    assert re.search(rf"<h2[^>]*>{main}", text)
    assert "<details>" not in text
    assert not [heading for heading, _ in further if heading in text]


def test_a_report_names_columns_that_its_table_has(page: Callable[[dict[str, Any]], str]) -> None:
    text = page(look())
    named = re.findall(r"the column <i>(.*?)</i>", text)
    assert named and {*named} <= {*re.findall(r"<th[^>]*>([^<]*)", text)}


def test_a_report_says_which_seeds_missed_the_level(
    page: Callable[[dict[str, Any]], str],
) -> None:
    missed = {f"{SETS} nearest 1": {"at_level": None, "reached_level": False}}
    assert page(summary(**missed)).count("(level not reached: seed 1)") == 1


def test_several_retain_sets_are_compared_with_what_ran_beside_them() -> None:
    (claim,) = [c for c in findings(study(), controls()) if "`nearest`" in c["claim"]]
    means = claim["numbers"]["means"]["ga, gradient space"]
    assert means["plain"]["retain_nll"] == RETAIN["plain"]  # not that of another learning rate
    assert means["authors"]["retain_nll"] == RETAIN["gru"]


def measured(words: str, **changed: dict[str, Any]) -> str:
    said: str = finding(study(**changed), words, controls())["measured"]
    return said


def test_a_finding_shows_the_numbers_that_it_compares() -> None:
    assert measured("reached the gold level") == "80 of 80"
    assert measured(
        "GA harms", **{"ga plain 1": {"share_appreciable_retaining_negative": 0.93}}
    ) == ("seed 0: 100 % of steps; seed 1: 93 % of steps")
    assert measured("WGA is milder").startswith("seed 0: -9 against GA's -300; seed 1: ")
    assert measured("NPO limits itself").startswith("seed 0: to 11 % of its peak, GA's to 100 %; ")
    assert measured("at least 1.3 times").startswith(
        "ga seed 0: 0.5 nats against 1, 2 times lower; ga seed 1: "
    )
    assert measured(
        "gru-coordinate keeps a lower retain NLL than", **{"wga gru 0": {"retain": 0.9}}
    ) == (
        "ga 0.05 nats against 0.5 (gru), 0.2 (gru-update); "
        "wga 0.05 nats against 0.7 (gru), 0.2 (gru-update); "
        "npo 0.05 nats against 0.5 (gru), 0.2 (gru-update)"
    )
    assert measured("forgetting, with 140 QA").startswith("ga 0.03 nats against 0.045 (sago); ")
    assert measured("best of its learning rates").startswith(
        "ga, 140 QA: gru 0.675 nats against 1.35 (plain); "
    )
    assert measured("`nearest`").startswith(
        "ga, gradient space, retain NLL: 0.4 nats against 0.9 (world), 1 (plain); "
    )
    assert "gru-update 0 % of steps; " in measured("no applied update")


def test_what_has_no_value_is_said_to_have_none() -> None:
    missed = {"ga gru 1": {"reached_level": False, "at_level": None}}
    assert "ga seed 1: no value nats against 1" not in measured("at least 1.3 times", **missed)
    assert "ga seed 1: no value against 1" in measured("at least 1.3 times", **missed)


def test_one_seed_is_not_called_several() -> None:
    one = [r for r in study() if r["seed"] == 0]
    said = findings(one, [r for r in controls() if r["seed"] == 0])
    assert [f["claim"] for f in said if not f["holds"]] == []
    assert not [f for f in said if re.search(r"every seed|over seeds|seed 0", str(f["claim"]))]
    assert sum("in the one seed" in f["claim"] for f in said) == len(said) - 2
    assert not [f for f in said if "seed 0" in f["measured"]]


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (14 / 15, True), (13 / 15, False)])
def test_one_step_with_the_sign_of_its_batch_makes_no_exception(share: float, holds: bool) -> None:
    runs = study(**{"ga plain 0": {"share_appreciable_retaining_negative": share}})
    assert finding(runs, "GA harms")["holds"] is holds


def audited(most: dict[str, float], **verdicts: str) -> list[dict[str, Any]]:
    """A study of two methods whose models were audited."""
    found = []
    for made in study():
        name = made["variant"]
        said = {
            "audit_benign": 0.1, "audit_swap": None, "audit_int4": 0.0,
            "audit_most": most.get(name, 0.02), "audit_attack": "int4",
            "verdict": verdicts.get(name.replace("-", "_"), "never knew"),
        }  # fmt: skip
        found.append({**made, "at_level": {**made["at_level"], **said}})
    return found


def test_forgetting_is_held_against_retraining_where_there_was_an_audit() -> None:
    def deep(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {f["claim"]: f for f in findings(runs) if re.search("audit|strongest", f["claim"])}

    assert deep(study()) == {}
    shares = {"plain": 0.3, "gru": 0.2, "gru-coordinate": 0.4, "select": 0.6}
    found = deep(audited(shares, plain="hidden", select="broken", gru="partly forgotten"))
    first, *others = found.values()
    assert not first["holds"]
    assert {*first["except"]} == {
        f"{m} {v}" for m in ("ga", "wga", "npo") for v in ("plain", "select")
    }
    assert "ga plain hidden, 30 % comes back" in first["measured"]
    by_variant = {f["claim"].split("after ")[1].split(" than")[0]: f for f in others}
    assert {name: f["holds"] for name, f in by_variant.items()} == {
        "gru": True, "gru-update": True, "gru-coordinate": False, "select": False,
    }  # fmt: skip
    assert by_variant["select"]["except"] == ["ga", "wga", "npo"]
    assert "ga 60 % against 30 % (plain)" in by_variant["select"]["measured"]
    assert deep(audited({}))[first["claim"]]["holds"]


def test_tables_have_the_columns_of_an_audit_where_there_was_one() -> None:
    runs = audited({"plain": 0.3}, plain="hidden")
    runs[1]["at_level"]["verdict"] = "never knew"
    gold = {str(seed): {"by_feed": {"140": GOLD}} for seed in (0, 1)}
    told = {"runs": runs, "further_runs": [], "gold": gold}
    lines = as_markdown(compared(told, "at_level", EQUAL)).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heads[-5:] == [
        "comes back (benign)",
        "decoder swap",
        "int4",
        "strongest attack",
        "verdict",
    ]
    plain = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert plain[-5:] == ["0.10", "", "0.00", "0.30", "hidden (1), never knew (1)"]
    without = as_markdown(compared({**told, "runs": study()}, "at_level", EQUAL))
    assert "comes back" not in without and "verdict" not in without


def test_what_no_run_was_asked_has_no_column() -> None:
    told = compared({"runs": study(), "further_runs": [], "gold": {}}, "at_level", EQUAL)
    told.loc[:, "savings"] = math.nan
    assert "savings" not in columns_of(told) and "retain_nll" in columns_of(told)
    told.loc[told.index[0], "savings"] = 0.2
    assert "savings" in columns_of(told)


def recognising(taught: dict[str, float], **changed: dict[str, Any]) -> list[dict[str, Any]]:
    """WGA in two seeds, with what is recognised after others were taught, by variant."""
    made = []
    for variant, value in taught.items():
        for seed in (0, 1):
            own = run("wga", variant, seed, part=HIDES if variant in HIDING else EQUAL)
            own["at_level"] |= {"recognition_taught": value, "retain_nll": 0.01, "world_nll": 0.03}
            own["at_level"] |= {"forget_es": 0.2, OUTSIDE: 0.015} | changed.get(
                f"{variant} {seed}", {}
            )
            made.append(own)
    return made


TAUGHT = {"select": 0.95, "select-relearned": 0.6, "last-block": 0.96, "name-rows": 0.72}
NEVER_KNEW = {
    str(seed): {**GOLD, "world_nll": 0.026, "recognition_taught": 0.51} for seed in (0, 1)
}
LESS = "select-relearned recognises at least 0.2 less than select "
PASSES = "alone the control name-rows forgot and harmed nothing"


def claimed(runs: list[dict[str, Any]], gold: Any = NEVER_KNEW) -> list[dict[str, Any]]:
    made = findings(
        [r for r in runs if r["part"] == EQUAL], [r for r in runs if r["part"] == HIDES], gold
    )
    return [f for f in made if "taught" in f["claim"] or PASSES in f["claim"]]


def test_what_hides_is_claimed_where_it_was_asked() -> None:
    found = claimed(recognising(TAUGHT))
    less, deep, block, rows, passes = found
    assert all(claim["holds"] for claim in found)
    assert "select-relearned forgets as deeply as retraining" in deep["claim"]
    assert "after the others were taught at most 0.61," in deep["claim"]
    assert deep["measured"] == "wga 0.6, 0.2, 0.015, 0.03"
    assert LESS in less["claim"] and "retain NLL of at most 0.02, in every seed" in less["claim"]
    assert less["measured"].startswith("wga seed 0: 0.60 against 0.95, at 0.01 nats; wga seed 1")
    assert "The control last-block is seen through" in block["claim"]
    assert rows["measured"].count("0.72 against 0.51") == 2
    assert PASSES in passes["claim"] and "world facts NLL 0.03 against 0.026" in passes["measured"]
    assert claimed(recognising({"select": 0.95})) == []
    assert claimed([run("wga", variant, 0) for variant in TAUGHT]) == []  # of a study of before
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("changed", "place", "excepted"),
    [
        (
            {
                "select-relearned 0": {"recognition_taught": 0.4},
                "select-relearned 1": {"recognition_taught": 0.76},
            },
            0,
            ["wga seed 1"],
        ),
        ({"select-relearned 0": {"retain_nll": 0.03}}, 0, ["wga seed 0"]),
        (
            {"last-block 0": {"recognition_taught": 0.6}},
            2,
            ["wga seed 0: recognition of the values to forget after the others were taught"],
        ),
        ({"name-rows 1": {"world_nll": 0.06}}, 4, ["wga seed 1: world facts NLL"]),
        ({"name-rows 0": {"forget_es": 0.3}}, 4, ["wga seed 0: forget extraction strength"]),
    ],
)
def test_a_claim_of_hiding_that_fails_says_where(
    changed: dict[str, Any], place: int, excepted: list[str]
) -> None:
    found = claimed(recognising(TAUGHT, **changed))
    assert found[place]["except"] == excepted
    assert [claim["holds"] for claim in found].count(False) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recognition_taught", 0.8),
        ("forget_es", 0.3),
        (OUTSIDE, 0.06),
        ("world_nll", 0.1),
    ],
)
def test_a_copy_that_misses_one_goal_is_not_near_the_retrained_model(
    key: str, value: float
) -> None:
    """One seed is far enough away to move the mean over the bar."""
    changed = {"select-relearned 1": {key: value}}
    (deep,) = [f for f in claimed(recognising(TAUGHT, **changed)) if "as deeply" in f["claim"]]
    assert deep["except"] == ["wga"]
    assert claimed(recognising({"select-relearned": 0.6}), gold={}) == []


def test_every_copy_is_held_against_what_it_is_made_of() -> None:
    told = {"gru-update": 0.9, "gru-update-70": 0.8, "gru-update-relearned": 0.65}
    found = [f for f in claimed(recognising(told)) if "less than" in f["claim"]]
    assert [f["claim"].split(" less than ")[1].split()[0] for f in found] == [
        "gru-update", "gru-update-70",
    ]  # fmt: skip
    assert [f["except"] for f in found] == [[], ["wga seed 0", "wga seed 1"]]


def test_a_control_that_missed_the_level_is_not_seen_through() -> None:
    runs = recognising(TAUGHT)
    next(r for r in runs if r["variant"] == "name-rows")["at_level"] = None
    *_, rows, passes = claimed(runs)
    assert not rows["holds"] and not passes["holds"]
    assert "no value" in rows["measured"]
    json.dumps([rows, passes], allow_nan=False)


def test_what_rounding_makes_of_a_step_violates_nothing(tmp_path: Path) -> None:
    model = shallow.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    with Recorder(model, tmp_path / "a.h5", update=True) as recorder:
        for pair in shallow.pairs(6, seed=0):
            losses = losses_of(model, pair)
            recorder.backward(objective={"forget": -1.0}, rectifier=rectifier, **losses)
            optimizer.step()
            optimizer.zero_grad()
    along = cosine(open_run(tmp_path / "a.h5"), "update", "retain_ema", by="model")["value"]
    assert along.max() > 1e-6
    assert shares(tmp_path / "a.h5")["share_update_violating"] == 0.0
