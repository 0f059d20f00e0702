"""The tables of a study: every run at equal forgetting, and at equal extraction strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .methods import EQUAL, FEW, RATES, SETS

AT_LEVEL = {
    "step": "step at the level",
    "retain_nll": "retain NLL",
    "retain_heldout_authors_nll": "retain NLL, authors outside the retain gradient",
    "world_nll": "world facts NLL",
    "forget_nll": "forget NLL",
    "forget_es": "forget extraction strength",
    "retain_es": "retain extraction strength",
    "forget_paraphrase_nll": "forget NLL, unseen paraphrases",
    "relearn_nll": "forget NLL after relearning the other half",
}
"""What is measured at a level, with its name in words."""

COLUMNS = {
    "learning_rate": ("learning rate", "{:g}"),
    "step": ("steps", "{:.0f}"),
    "retain_nll": ("retain NLL inside", "{:.3f}"),
    "retain_heldout_authors_nll": ("outside", "{:.3f}"),
    "world_nll": ("world facts NLL", "{:.3f}"),
    "forget_nll": ("forget NLL", "{:.2f}"),
    "forget_es": ("forget ES", "{:.2f}"),
    "forget_paraphrase_nll": ("paraphrases NLL", "{:.2f}"),
    "relearn_nll": ("relearned NLL", "{:.2f}"),
    "share_update_violating": ("violating steps", "{:.2f}"),
}

SETTING = ("method", "variant", "retain_feed", "seed", "learning_rate", "steps")
SHARES = ("share_retaining_negative", "share_update_violating")

ALONE = ("plain", "gru", "gru-update")
"""What several retain sets are compared with: variants that protect the authors alone, or none."""


def equal_forgetting(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row a run, at the forget NLL of the gold model of its seed, and a row for each gold model.

    Losses are nats per answer token; `relearn_nll` is the mean over the two halves. A run that did
    not reach the level has no values.
    """
    return compared(summary, "at_level", EQUAL)


def compared(summary: Mapping[str, Any], at: str, *parts: str) -> pd.DataFrame:
    """The runs of some parts where they reached a level, "at_level" or "at_es", and gold models."""
    return _table(summary, [run for run in _runs(summary) if run["part"] in parts], at)


def learning_rates(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The methods and feeds that were run at several learning rates, at each, at equal forgetting.

    Sorted by learning rate: what a variant owes to it stands in neighbouring rows.
    """

    def cell(run: Mapping[str, Any]) -> tuple[str, int]:
        return run["method"], run["retain_feed"]

    several = {cell(run) for run in _runs(summary) if run["part"] == RATES}
    runs = [run for run in _runs(summary) if cell(run) in several and run["part"] != SETS]
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    runs.sort(key=lambda r: (*cell(r), variants.index(r["variant"]), r["learning_rate"]))
    return _table(summary, runs, "at_level")


def retain_sets(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Variants that protect the authors, the world facts or both, at equal forgetting."""
    methods = [run["method"] for run in _runs(summary) if run["part"] == SETS]
    runs = [
        run
        for run in _runs(summary)
        if run["method"] in methods
        and (run["part"] == SETS or (run["part"] == EQUAL and run["variant"] in ALONE))
    ]
    return _table(summary, sorted(runs, key=lambda run: methods.index(run["method"])), "at_level")


def as_markdown(table: pd.DataFrame) -> str:
    """A table for a terminal or a README: means over the seeds that reached the level.

    Where some seeds did not, their number stands behind the steps.
    """
    names = ["method", "variant", "retain QA"]
    lines = [[*names, *(title for title, _ in COLUMNS.values())]]
    keys = ["method", "variant", "retain_feed", "learning_rate"]
    for key, part in table.groupby(keys, sort=False, dropna=False):
        means = part[list(COLUMNS)].mean()
        cells = {
            name: "" if means[name] != means[name] else form.format(means[name])
            for name, (_, form) in COLUMNS.items()
        }
        missing = int((~part["reached_level"]).sum())
        if missing:
            reached = f"({len(part) - missing} of {len(part)} seeds)"
            cells["step"] = f"{cells['step']} {reached}".strip()
        lines.append([*map(str, key[:3]), *cells.values()])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(x, widths, strict=True))
        ]
        for x in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def write_tables(summary: Mapping[str, Any], out: Path) -> None:
    """Every table for which there are runs, as out/<name>.csv and, in means, as out/<name>.md."""
    tables = {
        "equal_forgetting": compared(summary, "at_level", EQUAL, FEW),
        "equal_extraction": compared(summary, "at_es", EQUAL, FEW),
        "learning_rates": learning_rates(summary),
        "retain_sets": retain_sets(summary),
    }
    for name, table in tables.items():
        if table.loc[table["method"] != "gold", "reached_level"].any():
            table.to_csv(out / f"{name}.csv", index=False)
            (out / f"{name}.md").write_text(as_markdown(table), encoding="utf-8")


def _runs(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*summary["runs"], *summary["further_runs"]]


def _table(summary: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], at: str) -> pd.DataFrame:
    rows = [
        {
            **{name: run[name] for name in (*SETTING, *SHARES)},
            "reached_level": run[at] is not None,
            **_measured(run[at] or {}),
        }
        for run in runs
    ]
    feeds = dict.fromkeys(run["retain_feed"] for run in runs)
    gold = [
        {
            "method": "gold",
            "variant": "retrained",
            "retain_feed": feed,
            "seed": int(seed),
            "reached_level": True,
            **_measured(measured["by_feed"][str(feed)] | {"relearn_nll": measured["relearn_nll"]}),
        }
        for feed in feeds
        for seed, measured in summary["gold"].items()
    ]
    return pd.DataFrame([*rows, *gold], columns=[*SETTING, "reached_level", *AT_LEVEL, *SHARES])


def _measured(measured: Mapping[str, Any]) -> dict[str, float]:
    values = {key: measured[key] for key in AT_LEVEL if key in measured}
    if "relearn_nll" in values:
        values["relearn_nll"] = sum(values["relearn_nll"]) / len(values["relearn_nll"])
    return values
