"""What an audit found: the verdict, the tables that it is of, and how they were made."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from geffect.drafts import write_whole
from geffect.numbers import finite

from .geometry import Geometry
from .verdict import Verdict

FORMAT = 1
"""The version of the JSON of a report."""


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit found.

    - `judgement`: the verdict, why, and the flags beside it.
    - `table`: means and shares, `battery, metric, set, model, value, low, high, n`.
    - `items`: the value of every item, `battery, metric, set, model, item, subject, value`. Where
      some items of a set were looked at, they are counted among these.
    - `manifest`: models, data with their hashes, budget, thresholds, versions, what was skipped.
    - `geometry`: how far the updates of a run explain what was measured, where a run was given.
    - `controls`: how the audit reads models of which it is known whether they forgot, where that
      was asked for: the columns of `geffect.audit.controlled.Controlled.table`.
    - `texts`: question and answer of each forget item that has them, by its number.
    """

    judgement: Verdict
    table: pd.DataFrame = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    geometry: Geometry | None = field(default=None, repr=False)
    controls: pd.DataFrame | None = field(default=None, repr=False)
    texts: Mapping[int, tuple[str, str]] = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """The verdict, such as "hidden"."""
        return self.judgement.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in sentences, the decisive one first."""
        return self.judgement.reasons

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader has to know beside the verdict."""
        return self.judgement.flags

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as a page that opens offline, which is also written to `path`."""
        from .page import page

        text = page(self)
        if path is not None:
            write_whole(path, text)
        return text

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report without the values of single items, as JSON, which is also written to `path`.

        Values that are not numbers are null.
        """
        told = {
            "format": FORMAT,
            "verdict": self.verdict,
            "reasons": [*self.reasons],
            "flags": [*self.flags],
            "attack": self.judgement.attack,
            "exit_code": self.judgement.exit_code,
            "table": _plain(self.table),
            "geometry": None if self.geometry is None else _plain(self.geometry.table),
            "controls": None if self.controls is None else _plain(self.controls),
            "manifest": self.manifest,
        }
        text = json.dumps(finite(told), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_whole(path, text)
        return text


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
