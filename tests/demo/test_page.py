"""The page of a study holds its settings, its findings and every one of its numbers."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from geffect.demo.columns import AT_LEVEL
from geffect.demo.edits import EDITS
from geffect.demo.methods import ADAMW, OF_ALL, VARIANTS, every_objective
from geffect.demo.page import best, command, main, study_page, write_page
from geffect.demo.plan import IN_A_LOOK
from geffect.demo.scale_table import agreement, g_effects
from geffect.demo.tables import as_markdown, rows, tables

SEEN = ("retain_nll", "retain_heldout_authors_nll", "world_nll", "forget_es", "relearn_nll")


def test_the_page_of_a_study(quick_study: Any) -> None:
    page, summary = (quick_study.out / "study.md").read_text(), quick_study.summary
    assert page == study_page(summary)
    assert f"`{command(summary)}`" in page and "--quick" in command(summary)
    for finding in summary["findings"]:
        assert f"{finding['claim']}: {finding['measured']}." in page
    for name, variant in summary["config"]["variants"].items():
        assert f"| {name} | {variant['summary']} | {variant['learning_rate']:g} |" in page
    for table in tables(summary):
        assert table.heading in page
        for _, part in table.runs.groupby("retain_feed"):
            for line in as_markdown(part).splitlines()[2:]:
                assert re.sub(r" +", " ", line) in re.sub(r" +", " ", page)


def test_a_page_is_written_again(quick_study: Any, tmp_path: Any) -> None:
    (tmp_path / "summary.json").write_text((quick_study.out / "summary.json").read_text())
    main([str(tmp_path)])
    assert (tmp_path / "study.md").read_text() == (quick_study.out / "study.md").read_text()


def test_a_study_beside_controls_that_hide_shows_what_hides(quick_study: Any) -> None:
    summary = quick_study.summary
    first = summary["runs"][0]
    variants = summary["config"]["variants"]
    beside = {
        **summary,
        "runs": [*summary["runs"], {**first, "variant": "name-rows"}],
        "config": {
            **summary["config"],
            "variants": {**variants, "name-rows": variants[first["variant"]]},
        },
    }
    pages = [study_page(of).splitlines() for of in (summary, beside)]
    assert [page[0] for page in pages] == ["# The study", "# The study of what hides"]
    assert ["(figures/recognition.png)" in "\n".join(page) for page in pages] == [False, True]


def test_further_tables_and_single_seeds(quick_study: Any, tmp_path: Any) -> None:
    summary = quick_study.summary
    again = [{**run, "seed": 1} for run in summary["runs"]]
    controls = [
        {**run, "part": "learning rates", "learning_rate": 0.5}
        for run in (*summary["runs"], *again)
    ]
    twice = {
        **summary,
        "seeds": [0, 1],
        "runs": [*summary["runs"], *again],
        "further_runs": controls,
        **{k: {"0": summary[k]["0"], "1": summary[k]["0"]} for k in ("original", "gold")},
    }
    assert "Each seed" not in study_page(summary)
    write_page(twice, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "seeds 0, 1" in page and "## At several learning rates" in page
    row = rows(tables(twice)[0].runs)[0]
    assert len(row.seeds) == 2
    assert " / ".join(row.values["retain_nll"].single) in page


def edit(run: dict[str, Any], name: str, *, reached: bool) -> dict[str, Any]:
    """An edit with the numbers of a run."""
    at = {**run["at_level"], "step": None, "strength": 0.25, "retain_nll": 0.777}
    return {
        **run,
        "method": name,
        "variant": "edit",
        "learning_rate": None,
        "steps": None,
        "share_update_violating": None,
        "reached_level": reached,
        "highest_forget_nll": 2.25,
        "at_level": at if reached else None,
        "at_disruption": {**at, "retain_nll": 0.555},
        "before": {"forget_nll": 0.125, "retain_nll": 0.625},
        "stepped": None if reached else 0.0312,
        "overlap": None if reached else 0.25,
    }


def test_a_rank_correlation_without_an_interval_says_none(quick_study: Any) -> None:
    page = study_page(quick_study.summary)
    told = next(line for line in page.splitlines() if line.startswith("Rank correlation"))
    found = agreement(g_effects(quick_study.summary)).values()
    assert re.findall(r"[^ ]+ \(.*?5 runs\)", told) == [
        f"{one.r:.2f} ({'' if np.isnan(one.low) else f'{one.low:.2f} to {one.high:.2f}, '}5 runs)"
        for one in found
        if not np.isnan(one.r)
    ]
    assert "nan" not in told


def test_edits_stand_beside_the_runs(quick_study: Any) -> None:
    summary = quick_study.summary
    edits = [edit(summary["runs"][0], "mix", reached=True)]
    edits += [edit(summary["runs"][0], "negation-sku", reached=False)]
    config = {**summary["config"], "edits": {name: EDITS[name].described() for name in EDITS}}
    page = re.sub(r" +", " ", study_page({**summary, "config": config, "edits": edits}))
    assert "5 runs and 2 edits with seed 0" in page
    main, rest = page.split("## The price of forgetting")[1].split("## Before and after")
    before, rest = rest.split("## Edits at equal disruption")
    disruption, scales = rest.split("## G-effects on common scales")
    assert "| mix | edit | 30 | | | 0.777 |" in main
    assert "| negation-sku | edit | 30 | | (0 of 1 seeds) | |" in main
    assert "| (not above 2.25) |" in main
    assert re.findall(r"\| ([\w-]+) \| (other model|edit) \|", before) == [
        ("mix", "other model"), ("mix", "edit"),
        ("negation-sku", "other model"), ("negation-sku", "edit"),
    ]  # fmt: skip
    assert "| mix | other model | 30 | | | 0.625 | | | 0.12 |" in before
    assert disruption.count("| 0.555 |") == 2
    assert "| mix | edit |" in scales and "Rank correlation" in scales
    assert "| alpha | 0.25 |" in page
    masks = "3.12 % of coordinates a step, 25 % overlap from step to step"
    assert f"| {masks} | alpha | not reached |" in page
    best_of = page.split("## Which variant is best")[1].split("## The price")[0]
    assert "| ga |" in best_of and "| mix |" not in best_of
    assert "An edit trains nothing" not in study_page(summary)


def test_adamw_is_named_once(quick_study: Any) -> None:
    page = study_page(quick_study.summary)
    assert page.count("betas") == page.count(ADAMW) == 1
    defaults = VARIANTS["plain"].stepping([torch.nn.Parameter(torch.ones(1))], 1e-3).defaults
    said = f"betas {defaults['betas']}, eps {defaults['eps']:.0e}".replace("e-0", "e-")
    assert said in ADAMW and defaults["weight_decay"] == 0.0


def test_the_best_variants_are_those_of_a_loop() -> None:
    def runs(**values: list[float]) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    **dict.fromkeys((*AT_LEVEL, *SEEN), value),
                    "method": "gold" if variant == "gold" else "ga",
                    "variant": variant,
                    "retain_feed": 30,
                    "learning_rate": 1e-3,
                    "seed": seed,
                    "reached_level": value < 9,
                }
                for variant, seeds in values.items()
                for seed, value in enumerate(seeds)
            ]
        )

    # The lowest on the mean is b; nearest to gold is c; d did not reach the level in one seed.
    found = best(runs(a=[1.0, 5.0], b=[2.0, 2.0], c=[3.0, 3.5], d=[0.1, 9.0], gold=[3.0, 3.0]))
    (line,) = found.splitlines()[2:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "ga", "30", "b (2.000)", "b (2.000)", "b (2.000)", "a (3.00)", "a (3.00)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "variants", "more", "said"),
    [
        ({}, IN_A_LOOK, {}, "geffect demo --seeds 0,1 --methods ga"),
        ({}, [*IN_A_LOOK, "sago"], {"further_runs": [1]},
         "geffect demo --seeds 0,1 --methods ga --all-variants --controls"),
        ({}, ["plain", "hamu"], {"named": ["plain", "hamu"]},
         "geffect demo --seeds 0,1 --methods ga --variants plain,hamu"),
        ({}, ["plain"], {"named": ["plain"], "edits": [{"method": "ssd"}, {"method": "ssd"}]},
         "geffect demo --seeds 0,1 --methods ga --variants plain --edits ssd"),
        ({"source": "smol", "trained": {"layers": [3, 9], "lora": None}}, ["plain"], {},
         "geffect demo --model DIR --layers 3..9 --seeds 0,1"),
        ({"source": "smol", "trained": {"layers": None, "lora": 8}}, ["plain"], {},
         "geffect demo --model DIR --lora 8 --seeds 0,1"),
    ],
)  # fmt: skip
def test_the_command_of_a_study(recipe: Any, variants: Any, more: Any, said: str) -> None:
    runs = [{"method": "ga", "variant": variant} for variant in variants]
    config = {"quick": False, "recipe": recipe, "options": {}, "named": more.get("named", [])}
    assert (
        command({"seeds": [0, 1], "config": config, "runs": runs, "further_runs": [], **more})
        == said
    )


def test_the_command_of_a_study_of_all() -> None:
    runs = [{"method": m, "variant": v} for m in every_objective() for v in OF_ALL]
    config = {"quick": False, "recipe": {}, "options": {}, "named": list(OF_ALL)}
    edits = [{"method": name} for name in EDITS]
    summary = {"seeds": [0], "config": config, "runs": runs, "further_runs": [], "edits": edits}
    assert command(summary) == "geffect demo --seeds 0 --methods all"
    assert "--edits ssd" in command({**summary, "edits": edits[:1]})
