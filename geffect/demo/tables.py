"""The tables of a study: every run at equal forgetting, and at equal extraction strength."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from geffect.drafts import write_whole
from geffect.text import in_markdown

from .columns import (
    AT_LEVEL,
    COLUMNS,
    KEYS,
    OF_AN_AUDIT,
    OF_DEPTH,
    OF_ONE_FEED,
    PRINTED,
    PROBED,
    WORDS,
)
from .methods import EQUAL, FEW, HIDES, RATES, SETS

HIGHEST = "highest_forget_nll"
"""How far a run came that did not reach the level."""

LEARNED = "other model"
"""The variant of a row that is of the model which an edit takes something from."""

SETTING = ("method", "variant", "retain_feed", "seed", "learning_rate", "steps")
SHARES = ("share_retaining_negative", "share_update_violating")

ALONE = ("plain", "gru", "gru-update")
"""What several retain sets are compared with: variants that protect the authors alone, or none."""


@dataclass(frozen=True)
class Table:
    """One table of a study, with a row for every run that it compares and every gold model."""

    name: str  # of its files
    heading: str
    runs: pd.DataFrame

    @property
    def shown(self) -> Sequence[str]:
        """The columns of it in Markdown."""
        return OF_DEPTH if self.name in ("equal_values", "controls_that_hide") else PRINTED


@dataclass(frozen=True)
class Value:
    """What a row says of its seeds: the mean, in words too, and the single ones."""

    mean: float
    text: str  # empty where no seed has a value
    single: list[str]


@dataclass(frozen=True)
class Row:
    """The seeds of a method in a variant, with a feed, at a learning rate."""

    keys: dict[str, str]
    values: dict[str, Value]
    seeds: list[int]
    missed: list[int]  # the seeds that did not reach the level
    highest: float  # forget NLL that one of these came to; NaN where it is not known


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The main table, then each of the others where a run reached its level."""
    made = [Table(name, heading, of(summary)) for name, (heading, of) in TABLES.items()]
    main, *others = made
    return [main, *(table for table in others if _reached(table.runs))]


def compared(summary: Mapping[str, Any], at: str, *parts: str) -> pd.DataFrame:
    """A row for each run of some parts, at a level, "at_level" or "at_es", and each gold model.

    Losses are nats per answer token; `relearn_nll` is the mean over the two halves. A run that did
    not reach the level, which is that of the gold model of its seed, has no values. Edits stand
    behind the runs, where the level is one that they are made to reach.
    """
    compared = [run for run in _runs(summary) if run["part"] in parts]
    edits = _edits(summary) if EQUAL in parts and at == "at_level" else []
    return _table(summary, [*compared, *edits], at)


def equal_disruption(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The edits, each as strong as the same KL on retain answers takes."""
    return _table(summary, _edits(summary), "at_disruption")


def before_edits(summary: Mapping[str, Any]) -> pd.DataFrame:
    """What was learned to be taken away, and the model it was taken away from, row by row."""
    made = [edit for edit in _edits(summary) if edit["before"]]
    names = dict.fromkeys(edit["method"] for edit in made)
    rows = [
        row
        for name in names
        for row in (
            *[
                {**e, "variant": LEARNED, "at_level": e["before"]}
                for e in made
                if e["method"] == name
            ],
            *[e for e in made if e["method"] == name],
        )
    ]
    return _table(summary, rows, "at_level")


def learning_rates(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The methods and feeds that were run at several learning rates, at each, at equal forgetting.

    Sorted by learning rate: what a variant owes to it stands in neighbouring rows.
    """

    def cell(run: Mapping[str, Any]) -> tuple[str, int]:
        return run["method"], run["retain_feed"]

    several = {cell(run) for run in _runs(summary) if run["part"] == RATES}
    runs = [
        run for run in _runs(summary) if cell(run) in several and run["part"] not in (SETS, HIDES)
    ]
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


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], pd.DataFrame]]] = {
    "equal_forgetting": (
        "The price of forgetting",
        lambda summary: compared(summary, "at_level", EQUAL, FEW),
    ),
    "equal_values": (
        "At equal loss of the values to forget",
        lambda summary: compared(summary, "at_value", EQUAL),
    ),
    "controls_that_hide": (
        "Controls that hide",
        lambda summary: compared(summary, "at_level", HIDES),
    ),
    "equal_extraction": (
        "At equal extraction strength",
        lambda summary: compared(summary, "at_es", EQUAL, FEW),
    ),
    "learning_rates": ("At several learning rates", learning_rates),
    "retain_sets": ("With several retain sets", retain_sets),
    "before_edits": ("Before and after negation and mixing", before_edits),
    "equal_disruption": ("Edits at equal disruption", equal_disruption),
}
"""Every table by the name of its files, with its heading; the first is the main one."""


def columns_of(runs: pd.DataFrame) -> tuple[str, ...]:
    """The columns that are shown of a table: those of what was asked, and of an audit if there was
    one.
    """
    known = runs.notna().any()
    unasked = {name for name in PROBED if not known[name]}
    if not known["verdict"]:
        unasked.update(OF_AN_AUDIT)
    return tuple(name for name in COLUMNS if name not in unasked)


def rows(runs: pd.DataFrame, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, the seeds of each in one, as they are shown.

    - `columns`: some of `COLUMNS`; those of the table if left out.
    """
    shown = columns or columns_of(runs)
    grouped = runs.groupby(list(KEYS), sort=False, dropna=False)
    return [_row(key, part, shown) for key, part in grouped]


def before(summary: Mapping[str, Any], feeds: Iterable[int]) -> pd.DataFrame:
    """Rows for the models before unlearning, as those of the gold models in a table."""
    return _frame(_models(summary["original"], ("before", "unlearning"), feeds))


def as_cells(runs: pd.DataFrame, shown: Sequence[str] = PRINTED) -> list[list[str]]:
    """The headings and the rows of a table: means over the seeds that reached the level.

    Where some seeds did not, their number stands behind the steps, and how far they came behind
    the forget NLL.
    """
    printed = [name for name in columns_of(runs) if name in shown]
    lines = [[title for title, _ in (*KEYS.values(), *(COLUMNS[name] for name in printed))]]
    for row in rows(runs):
        cells = {name: row.values[name].text for name in printed}
        if row.missed:
            reached = len(row.seeds) - len(row.missed)
            cells["step"] = f"{cells['step']} ({reached} of {len(row.seeds)} seeds)".strip()
            if row.highest == row.highest:
                at_most = COLUMNS["forget_nll"][1].format(row.highest)
                cells["forget_nll"] = f"{cells['forget_nll']} (not above {at_most})".strip()
        lines.append([*row.keys.values(), *cells.values()])
    return lines


def as_markdown(runs: pd.DataFrame, shown: Sequence[str] = PRINTED) -> str:
    """The table for a README."""
    headings, *cells = as_cells(runs, shown)
    keys = len(KEYS)
    lines = [headings, *([*map(in_markdown, row[:keys]), *row[keys:]] for row in cells)]
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
    """Every table of a study, as out/<name>.csv and, in means, as out/<name>.md."""
    for table in tables(summary):
        write_whole(out / f"{table.name}.csv", table.runs.to_csv(index=False))
        write_whole(out / f"{table.name}.md", as_markdown(table.runs, table.shown))


def _runs(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*summary["runs"], *summary["further_runs"]]


def _edits(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*summary.get("edits", ())]


def _table(summary: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], at: str) -> pd.DataFrame:
    measured = [
        {
            **{name: run[name] for name in (*SETTING, *SHARES)},
            HIGHEST: run.get(HIGHEST),
            "reached_level": run.get(at) is not None,
            **_measured(run.get(at) or {}),
        }
        for run in runs
    ]
    feeds = dict.fromkeys(run["retain_feed"] for run in runs)
    return _frame([*measured, *_models(summary["gold"], ("gold", "retrained"), feeds)])


def _models(
    by_seed: Mapping[str, Mapping[str, Any]], name: tuple[str, str], feeds: Iterable[int]
) -> list[dict[str, Any]]:
    """A row for each model that is compared with the runs, at every feed."""
    method, variant = name
    return [
        {
            "method": method,
            "variant": variant,
            "retain_feed": feed,
            "seed": int(seed),
            "reached_level": True,
            **_measured(
                measured["by_feed"][str(feed)]
                | {name: measured[name] for name in OF_ONE_FEED if name in measured}
            ),
        }
        for feed in feeds
        for seed, measured in by_seed.items()
    ]


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*SETTING, HIGHEST, "reached_level", *AT_LEVEL, *SHARES])
    # A column of nothing but None has no number in it, and is one of numbers all the same.
    words = ("method", "variant", "reached_level", *WORDS)
    numbers = [name for name in frame if name not in words]
    return frame.astype({name: float for name in numbers if frame[name].dtype == object})


def _reached(runs: pd.DataFrame) -> bool:
    return bool(runs.loc[runs["method"] != "gold", "reached_level"].any())


def _row(key: Iterable[Any], part: pd.DataFrame, shown: Iterable[str]) -> Row:
    missed = ~part["reached_level"]
    return Row(
        {n: _text(x, form) for (n, (_, form)), x in zip(KEYS.items(), key, strict=True)},
        {
            name: (_said if name in WORDS else _value)(_known(part[name]), COLUMNS[name][1])
            for name in shown
        },
        part["seed"].tolist(),
        part["seed"][missed].tolist(),
        part[HIGHEST][missed].max(),
    )


def _known(column: "pd.Series[Any]") -> list[Any]:
    return [x for x in column.tolist() if not pd.isna(x)]


def _value(single: Sequence[float], form: str) -> Value:
    mean = fmean(single) if single else float("nan")
    return Value(mean, _text(mean, form), [form.format(x) for x in single])


def _said(single: Iterable[str], form: str) -> Value:
    """What is said of the seeds, each once, with the number of seeds where they differ."""
    counts = Counter(single)
    several = len(counts) > 1
    told = ", ".join(f"{said} ({n})" if several else str(said) for said, n in counts.items())
    return Value(float("nan"), told, [form.format(x) for x in single])


def _text(value: Any, form: str) -> str:
    return "" if pd.isna(value) else form.format(value)


def _measured(measured: Mapping[str, Any]) -> dict[str, float]:
    values = {key: measured[key] for key in AT_LEVEL if key in measured}
    if "relearn_nll" in values:
        values["relearn_nll"] = sum(values["relearn_nll"]) / len(values["relearn_nll"])
    return values
