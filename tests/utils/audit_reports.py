"""A report of an audit, made of a few rows of a table."""

from types import SimpleNamespace
from typing import Any

import pandas as pd

from geffect.audit.table import SUMMED

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

SHARES = [row for row in ROWS if row[0].endswith("share")]
"""They make one picture; what a page says beside its pictures needs no more."""


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
