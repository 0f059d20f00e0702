"""What an audit found: the verdict, the tables that it is of, and how they were made."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from .verdict import Verdict

FORMAT = 1


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit found.

    - `judgement`: the verdict, why, and the flags beside it.
    - `table`: means and shares, `battery, metric, set, model, value, low, high, n`.
    - `items`: the value of every item, `battery, metric, set, model, item, subject, value`.
    - `manifest`: models, data with their hashes, budget, thresholds, versions, what was skipped.
    """

    judgement: Verdict
    table: pd.DataFrame = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)

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
