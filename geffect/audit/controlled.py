"""How an audit reads its controls, beside the model that it is of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from geffect.evaluation.memorised import nll
from geffect.evaluation.tokens import unpadded

from .attacks import FASTER, HIDDEN
from .batteries import BATTERIES
from .controls import CONTROLS, Batches, Control
from .look import Look
from .models import ORIGINAL, UNLEARNED
from .sets import FORGET, RETAIN
from .summary import Values, table_of
from .table import value_of
from .teaching import batches_of
from .thresholds import Thresholds
from .verdict import (
    BROKEN,
    KEPT_SHARE,
    MEMORISED,
    NLL,
    RECOVERABLE,
    REMEMBERS,
    UTILITY,
    Verdict,
    judged,
)

COLUMNS = ("control", "says", "should", "reads", "attack", "share", "nll", "kept")

UNREAD = "could not be built"

ASKED = 64
"""So many forget items, at most, tell whether a control says no more of them."""

BATCH = 16


@dataclass(frozen=True)
class Controlled:
    """The audit whose controls are read: what it has found, and how it looks at a model.

    - `items`: the values of all items under the models of the audit.
    - `names`: its batteries.
    - `look`: the original, as the batteries see it.
    """

    items: pd.DataFrame
    names: Sequence[str]
    look: Look
    limits: Thresholds
    tell: Callable[[str, float], None] = lambda what, done: None

    def table(self) -> pd.DataFrame:
        """A row a control, and one of the model that is audited before them.

        Columns: control; `says`, what is known of it; `should`, the verdict that is right; `reads`,
        the verdict of the audit; `attack` and `share`, what brings most back; `nll` of the forget
        set; `kept`, the least share of a retained set. A control that cannot be built says why.
        """
        own = self.items[self.items["model"] == UNLEARNED]
        rows = [("this model", "", "", *self._read(own))]
        for place, control in enumerate(CONTROLS):
            self.tell(control.name, place / len(CONTROLS))
            try:
                found = self._read(self._rows(control))
            except ValueError as error:
                self.look.skipped[f"control {control.name}"] = str(error)
                found = UNREAD, "", np.nan, np.nan, np.nan
            rows.append((control.name, control.says, control.should, *found))
        return pd.DataFrame(rows, columns=[*COLUMNS])

    def _rows(self, control: Control) -> pd.DataFrame:
        """The values of all items under a control, told as those of an unlearned model."""
        if control.make is None:
            roles = {ORIGINAL: [ORIGINAL]}.get(control.name, self._values.roles[:1])
            if not roles:
                raise ValueError("No retrained model was given.")
            return self.items[self.items["model"] == roles[0]].assign(model=UNLEARNED)
        level = self._values.floor(MEMORISED, NLL)
        if level is None:
            raise ValueError(f"It takes the battery {MEMORISED}, which says how far to go.")
        asked = [*self.look.sets[FORGET].items[:ASKED]]
        target = float(np.nanmean(np.asarray(level.values, np.float64)))

        def reached(model: nn.Module) -> bool:
            return float(np.nanmean(nll(self.look.read(asked, model)))) >= target

        rate = FASTER * self.look.learning_rate
        model = control.make(self.look.model, self._batches(), rate, reached)
        plain = [name for name in self.names if name != HIDDEN]
        found = self._looked_at(model, plain)
        if HIDDEN in self.names and self._judged(found)[0].verdict not in (BROKEN, REMEMBERS):
            # What is told without attacks is told before them.
            found = pd.concat([found, self._looked_at(model, [HIDDEN])], ignore_index=True)
        return found

    @property
    def _values(self) -> Values:
        return Values.of(self.items)

    def _batches(self) -> Batches:
        drawn = {
            name: batches_of(unpadded(self.look.model, self.look.sets[name].items), BATCH, seed=0)
            for name in (FORGET, RETAIN)
        }
        while True:
            yield {name: next(batches) for name, batches in drawn.items()}

    def _looked_at(self, model: nn.Module, names: Sequence[str]) -> pd.DataFrame:
        look = self.look.at(UNLEARNED, model)
        return pd.concat([rows for name in names for rows in BATTERIES[name](look)])

    def _judged(self, own: pd.DataFrame) -> tuple[Verdict, pd.DataFrame]:
        others = self.items[self.items["model"] != UNLEARNED]
        table = table_of(pd.concat([others, own], ignore_index=True), self.limits)
        return judged(table, self.limits), table

    def _read(self, own: pd.DataFrame) -> tuple[str, str, float, float, float]:
        verdict, table = self._judged(own)
        of_it = table[table["model"] == UNLEARNED]
        shares = of_it[of_it["battery"] == RECOVERABLE].set_index("metric")["value"]
        kept = of_it[(of_it["battery"] == UTILITY) & (of_it["metric"] == KEPT_SHARE)]["value"]
        said = value_of(of_it, battery=MEMORISED, metric=NLL, set=FORGET)
        return (
            verdict.verdict,
            verdict.attack or "",
            float(shares.get(verdict.attack, np.nan)),
            said["value"] if said else np.nan,
            float(kept.min()),
        )
