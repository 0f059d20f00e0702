"""What the pictures of an audit are drawn of: rows of its table, by what they are called there.

Of several retrained models it is their mean.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from geffect.scores import PER_TOKEN, Score, said

from .attacks import DEPTH, HIDDEN, PATCHED, RELEARNING
from .models import ROLES, UNLEARNED
from .sets import FORGET
from .shares import recoverable_share
from .verdict import DIRECT, MEMORISED, NLL, RECOVERABLE
from .words import called

MARKED = ("label", "model", "value", "low", "high")
"""The columns of marks with intervals, as `geffect.plots.shares` draws them."""

RELEARNED = re.compile(rf"{RELEARNING} benign, (\d+) steps?, rate x 1$")
"""The attack whose course is drawn: with benign text, at the first rate."""

OF_SHARES = Score("share of what the original knows")
OF_SCORES = Score("score from 0 to 1")
OF_NLL = Score("NLL of the forget set", PER_TOKEN)
OF_DEPTH = Score("fall of log p of the answer", PER_TOKEN)


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """What is there and what comes back, of the model audited; of the others the noise.

    Columns: label, model, value, low, high, score, unit; no rows where no share was measured.
    """
    own = marks(_of(table, battery=(DIRECT, RECOVERABLE), model=(UNLEARNED,)))
    if own.empty:
        return own
    others = [model for model in ROLES if model != UNLEARNED]
    noise = marks(_of(table, battery=(RECOVERABLE,), model=others))
    return said(pd.concat([own, noise], ignore_index=True), OF_SHARES)


def marks(rows: pd.DataFrame, label: str = "metric") -> pd.DataFrame:
    """Rows of an audit's table that have a value, called by one of their columns.

    Where two of one model are called the same, the battery tells them apart.
    """
    there = rows[np.isfinite(rows["value"].to_numpy(dtype=float))]
    marked = there.assign(label=there[label].astype(str).map(called))
    twice = marked.duplicated(["label", "model"], keep=False)
    marked.loc[twice, "label"] += ", " + marked.loc[twice, "battery"].astype(str)
    return _by_role(marked[[*MARKED]])


def measured(
    table: pd.DataFrame,
    battery: str,
    metrics: Collection[str],
    *,
    of: str | None = None,
    label: str = "metric",
) -> pd.DataFrame:
    """Metrics of a battery as marks, of one set where `of` names it."""
    wanted: dict[str, Collection[str]] = {
        "battery": (battery,), "metric": metrics, "model": ROLES,
    }  # fmt: skip
    return marks(_of(table, **wanted, **({} if of is None else {"set": (of,)})), label)


def share_of_nll(table: pd.DataFrame) -> float:
    """How much of what the original knows is there by the NLL, before any attack; NaN if unknown.

    >>> rows = [("memorised", "nll", "forget", "original", 0.0),
    ...         ("memorised", "nll", "forget", "retrained", 4.0),
    ...         ("memorised", "nll", "forget", "unlearned", 3.0)]
    >>> share_of_nll(pd.DataFrame(rows, columns=["battery", "metric", "set", "model", "value"]))
    0.25
    """
    rows = _of(table, battery=(MEMORISED,), metric=(NLL,), set=(FORGET,))
    original, retrained, own = rows.set_index("model")["value"].reindex(ROLES)
    return recoverable_share([own], [retrained], [original], [FORGET]).value


def relearning(table: pd.DataFrame) -> pd.DataFrame:
    """The NLL of the forget set over the steps of further training on benign text.

    Columns: model, step, value, score, unit.
    """
    rows = [
        {"model": row["model"], "step": int(found[1]), "value": row["value"]}
        for row in _of(table, battery=(HIDDEN,), set=(FORGET,)).to_dict("records")
        if (found := RELEARNED.match(row["metric"]))
    ]
    attacked = {row["model"] for row in rows}
    before = _of(table, battery=(MEMORISED,), metric=(NLL,), set=(FORGET,), model=attacked)
    rows += [
        {"model": row["model"], "step": 0, "value": row["value"]}
        for row in before.to_dict("records")
    ]
    return _curves(rows, "step", OF_NLL)


def depth(table: pd.DataFrame) -> pd.DataFrame:
    """What the original makes of the output of each block: by how much log p falls.

    Columns: model, block, value, score, unit.
    """
    rows = [
        {
            "model": row["model"],
            "block": int(row["metric"].removeprefix(PATCHED)),
            "value": row["value"],
        }
        for row in _of(table, battery=(DEPTH,), set=(FORGET,)).to_dict("records")
        if row["metric"].startswith(PATCHED)
    ]
    return _curves(rows, "block", OF_DEPTH)


def _of(table: pd.DataFrame, **wanted: Collection[str]) -> pd.DataFrame:
    """The rows whose columns have one of the values that are wanted."""
    for column, values in wanted.items():
        table = table[table[column].isin([*values])]
    return table


def _curves(rows: Sequence[Mapping[str, object]], over: str, score: Score) -> pd.DataFrame:
    found = pd.DataFrame(rows, columns=["model", over, "value"])
    there = found[np.isfinite(found["value"].to_numpy(dtype=float))]
    ordered = _by_role(_of(there, model=ROLES)).sort_values(["model", over])
    return said(ordered.reset_index(drop=True), score)


def _by_role(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, whose models are in the order of their roles."""
    roles = pd.CategoricalDtype([*ROLES], ordered=True)
    return rows.astype({"model": roles}).reset_index(drop=True)
