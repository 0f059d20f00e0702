"""One model as the batteries of an audit see it: who it is, what is asked, and how far they go."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from numpy.typing import ArrayLike
from torch import nn

from geffect.data.collate import Item
from geffect.evaluation.ends import ends_of
from geffect.evaluation.tokens import TokenTable, evaluate_tokens

from .budget import Budget
from .depth import DepthProbe
from .models import ORIGINAL
from .sets import FORGET, HOLDOUT, AuditSet, AuditSets
from .table import per_item

Tell = Callable[[str, float], None]
"""Told what is done now, and how much of the model's part is done, from 0 to 1."""


@dataclass
class Original:
    """The original, to which attacks hand what they find in a model; it is read once."""

    model: nn.Module
    probes: dict[str, DepthProbe] = field(default_factory=dict)

    def probe(self, of: AuditSet, ends: Collection[int]) -> DepthProbe:
        """What asks the original about another model's states."""
        if of.name not in self.probes:
            self.probes[of.name] = DepthProbe(self.model, of.items, ends=ends)
        return self.probes[of.name]


@dataclass(frozen=True)
class Look:
    """One model, as the batteries see it: who it is, what is asked, and how far they go.

    - `skipped`: gets what could not be measured, and why.
    """

    role: str
    model: nn.Module
    sets: AuditSets
    budget: Budget
    learning_rate: float
    original: Original
    has_retrained: bool
    tell: Tell = lambda what, done: None
    skipped: dict[str, str] = field(default_factory=dict)
    records: dict[tuple[str, int], TokenTable] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[AuditSet, ...]:
        """What is asked for: the forget set.

        Of the original, where there is no retrained model, the holdout too: that says what a model
        would show that never knew.
        """
        estimates = self.role == ORIGINAL and not self.has_retrained and HOLDOUT in self.sets
        return (self.sets[FORGET], *([self.sets[HOLDOUT]] if estimates else []))

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, those of the chat template among them.

        They are the original's for all models, whose configurations may differ: values are held
        against each other, and are of the same tokens.
        """
        return ends_of(self.original.model, self.sets.tokenizer)

    def at(self, role: str, model: nn.Module) -> "Look":
        """Another model, looked at in the same way; what cannot be measured of it is not told."""
        return replace(self, role=role, model=model, skipped={}, records={})

    def record(self, of: AuditSet) -> TokenTable:
        """What the model says to each token of a set, which is read once."""
        key = of.name, len(of)
        if key not in self.records:
            self.records[key] = self.read(of.items)
        return self.records[key]

    def read(self, items: Sequence[Item], model: nn.Module | None = None) -> TokenTable:
        """What the model, or a changed form of it, says to each token of some items."""
        return evaluate_tokens(model or self.model, items, ends=self.ends)

    def rows(self, battery: str, metric: str, of: AuditSet, values: ArrayLike) -> pd.DataFrame:
        """Values of the items of a set as rows."""
        return per_item(battery, metric, of.name, self.role, values, of.subjects, of.numbers)

    def tried(
        self, what: str, made: Callable[[], Iterator[pd.DataFrame]]
    ) -> Iterator[pd.DataFrame]:
        """The rows of what does not fit every model; where it does not, why is noted."""
        try:
            yield from [*made()]
        except (ValueError, NotImplementedError) as error:
            self.skipped.setdefault(f"{what} of {self.role}", str(error))
