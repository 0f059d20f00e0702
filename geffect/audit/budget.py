"""How far an audit goes: `QUICK` for a look, `FULL` for a report."""

from dataclasses import dataclass, replace

import numpy as np

from .relearning import BENIGN, RelearningBudget
from .sets import AuditSet


@dataclass(frozen=True)
class Budget:
    """How far the batteries go.

    - `name`: what it is called in a report.
    - `relearning`: from what, how many steps, at which rates and in which orders.
    - `taught`: how many steps facts are shown before others are asked for, by recognition.
    - `kept`: how many items of each retained set are looked at; None for all.
    - `said`: how many retained questions the model answers by itself.
    - `samples`: how many answers are drawn to each question; 0 for none.
    - `layers`: whether depth is measured at every layer, by patching, or at the last one alone.

    >>> QUICK.kept, FULL.kept
    (200, None)
    """

    name: str
    relearning: RelearningBudget
    taught: tuple[int, ...]
    kept: int | None
    said: int | None
    samples: int
    layers: bool

    def some_of(self, of: AuditSet, most: int | None) -> AuditSet:
        """The set, or so many of its items, evenly apart."""
        if most is None or len(of) <= most:
            return of
        return of.some(np.linspace(0, len(of) - 1, most).astype(int).tolist())


QUICK = Budget(
    "quick",
    RelearningBudget(steps=(4, 16, 48), rates=(1.0,), seeds=(0,), sources=(BENIGN,)),
    taught=(20,),
    kept=200,
    said=20,
    samples=0,
    layers=True,
)
"""A look: benign relearning at one rate, in one order."""

FULL = replace(
    QUICK,
    name="full",
    relearning=RelearningBudget(),
    taught=(5, 20, 40),
    kept=None,
    said=200,
    samples=8,
)
"""A report: every source, rate and order, all items, and answers that are drawn."""

BUDGETS = {budget.name: budget for budget in (QUICK, FULL)}
