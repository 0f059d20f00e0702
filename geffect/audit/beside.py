"""Audits of several models that were unlearned from one original: the others are read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from .batteries import BATTERIES
from .budget import QUICK, Budget
from .look import Look, Original
from .models import ORIGINAL, RETRAINED, UNLEARNED, retrained_roles
from .sets import AuditSets
from .summary import table_of
from .table import with_mean
from .thresholds import Thresholds
from .verdict import Verdict, judged


@dataclass
class Beside:
    """An original and retrained models, read once, beside which unlearned models are judged.

    - `retrained`: one, or a sequence of several that were trained from different seeds.
    - `sets`, `budget`, `learning_rate`: as for `geffect.audit`; the rate has to be given.
    - `batteries`: what is measured.
    - `known`: what `read` of another one has found of the original and the retrained models.
    """

    original: nn.Module
    retrained: nn.Module | Sequence[nn.Module]
    sets: AuditSets
    learning_rate: float
    budget: Budget = QUICK
    batteries: Sequence[str] = tuple(BATTERIES)
    known: pd.DataFrame | None = field(default=None, repr=False)
    _original: Original | None = field(default=None, repr=False)

    def audited(
        self, unlearned: nn.Module, thresholds: Thresholds | None = None
    ) -> tuple[Verdict, pd.DataFrame]:
        """The verdict of one unlearned model, and its table."""
        items = pd.concat([self.read(), self._of(UNLEARNED, unlearned)], ignore_index=True)
        limits = thresholds or Thresholds()
        table = table_of(items, limits)
        return judged(table, limits), table

    def read(self) -> pd.DataFrame:
        """The values of all items under the original and the retrained models."""
        if self.known is None:
            self.known = self._beside()
        return self.known

    def _beside(self) -> pd.DataFrame:
        given = self.retrained
        several = [given] if isinstance(given, nn.Module) else [*given]
        roles = retrained_roles(len(several))
        known = {ORIGINAL: self.original, **dict(zip(roles, several, strict=True))}
        items = pd.concat([self._of(role, model) for role, model in known.items()])
        return items if len(several) == 1 else with_mean(items, roles, RETRAINED)

    def _of(self, role: str, model: nn.Module) -> pd.DataFrame:
        if self._original is None:
            self._original = Original(self.original)
        look = Look(
            role,
            model,
            self.sets,
            self.budget,
            self.learning_rate,
            self._original,
            has_retrained=True,
        )
        return pd.concat([rows for name in self.batteries for rows in BATTERIES[name](look)])
