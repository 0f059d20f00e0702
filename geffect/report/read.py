"""What a report reads of a run: its scores, once, for its table, findings and charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.analysis import (
    Comparison,
    compare,
    conflict,
    cosine,
    g_effect,
    implicit_weights,
    rectification,
    violation,
)
from geffect.analysis.base import check_steps
from geffect.analysis.rectified import acts, constrained
from geffect.groups import By
from geffect.scores import BLOCKS, blocks_of
from geffect.sources import AVERAGE, UPDATE
from geffect.store import Run

from .held import Held, held

Numbers = NDArray[np.float64]

FINER: Mapping[str, By] = {"group": "group", "layer": "layer", "parameter": "layer"}
"""The blocks of a rectifier's constraints, and those that a report shows."""


@dataclass(frozen=True, eq=False)
class Read:
    """A run with its name among the others of a report, and its scores.

    - `first`: the run that it is held against; None of that one itself.
    """

    run: Held
    name: str
    anchor: str
    by: By
    first: Held | None = None

    def read_all(self) -> None:
        """Take every score while the rows of the run, and those of the first, are in memory."""
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                getattr(self, name)

    @cached_property
    def repeats(self) -> bool:
        """Whether steps come again, as in a run of several requests: then its rows are counted."""
        return len({*self.run.steps.tolist()}) < len(self.run.steps)

    @property
    def across(self) -> str:
        """What charts count from left to right."""
        return "row" if self.repeats else "step"

    @cached_property
    def steps(self) -> list[int]:
        """The steps; of a run in which they repeat the numbers of its rows."""
        steps: list[int] = self.run.steps.tolist()
        return [*range(len(steps))] if self.repeats else steps

    def _counted(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table of the run whose steps are those of `steps`."""
        if not self.repeats:
            return table
        told_apart = [
            c for c in table.columns if c in BLOCKS or c in ("effect", "quantity", "against")
        ]
        return table.assign(step=table.groupby(told_apart, observed=True).cumcount())

    @cached_property
    def losses(self) -> Mapping[str, Numbers]:
        return self.run.losses()

    def loss(self, name: str) -> Numbers:
        """One loss over the steps; of no length where the run does not have it."""
        return self.losses.get(name, np.array([]))

    @cached_property
    def effects(self) -> pd.DataFrame:
        """The G-effects of the model."""
        return self._counted(g_effect(self.run, "model"))

    @cached_property
    def block_effects(self) -> pd.DataFrame:
        return self._counted(g_effect(self.run, self.by))

    @cached_property
    def cosine(self) -> pd.DataFrame:
        """The cosine of objective and retain gradient, of the model."""
        return self._counted(cosine(self.run, "objective", "retain", "model"))

    @cached_property
    def block_cosine(self) -> pd.DataFrame:
        return self._counted(cosine(self.run, "objective", "retain", self.by))

    @cached_property
    def conflicts(self) -> pd.DataFrame:
        """Of the blocks that the rectifier constrains."""
        return self._counted(conflict(self.run))

    @cached_property
    def violations(self) -> pd.DataFrame | None:
        """Of the same blocks; None where the run has no update or no average."""
        averages = any(name.endswith(AVERAGE) for name in self.run.sources)
        return violation(self.run) if UPDATE in self.run.sources and averages else None

    @cached_property
    def rectifications(self) -> Mapping[By, pd.DataFrame]:
        """What a rectifier did, of the model and of its own layers or groups; none without one."""
        if not self.run.contents.blocks:
            return {}
        finer = FINER.get((self.run.manifest["rectifier"] or {}).get("scope", "model"))
        levels: list[By] = ["model", finer] if finer else ["model"]
        return {by: self._counted(rectification(self.run, by)) for by in levels}

    @cached_property
    def weights(self) -> pd.DataFrame | None:
        """The means of the implicit weights; None where the run has none."""
        if not self.run.contents.weights:
            return None
        table = implicit_weights(self.run)
        return table[table["statistic"] == "mean"]

    @cached_property
    def parts(self) -> Comparison | str | None:
        """Where it parts from the first run, or why the two do not compare."""
        if self.first is None:
            return None
        try:
            return compare(self.first, self.run)
        except ValueError as refused:
            return str(refused)

    @property
    def rectified(self) -> bool:
        return acts(self.run)

    @property
    def constrained(self) -> str | None:
        return constrained(self.run)

    def effect(self, name: str) -> Numbers:
        """One G-effect of the model over the steps."""
        return self.effects.loc[self.effects["effect"] == name, "value"].to_numpy(dtype=float)

    def rates(self) -> list[tuple[str, dict[str, dict[str, float]]]]:
        """How often there is a conflict, and a violation, of the blocks with a constraint.

        What is of parameters is shown by layer. Scores of the same blocks share a table: what it
        is by, and by block the rate of each score.
        """
        tables = {"conflict rate": self.conflicts}
        if self.violations is not None:
            several = self.violations.groupby("against", observed=True) if (
                "against" in self.violations
            ) else ()  # fmt: skip
            tables |= {f"violation rate, {name}": own for name, own in several} or {
                "violation rate": self.violations
            }
        layer_of = {parameter.name: parameter.layer for parameter in self.run.layers}
        shown: dict[str, dict[str, dict[str, float]]] = {}
        for name, table in tables.items():
            by, blocks = blocks_of(table), table[blocks_of(table)].astype(str)
            if by == "parameter":
                by, blocks = "parameters of", blocks.map(layer_of)
            rates = table.groupby(blocks.rename(by), sort=False)["value"].mean()
            for block, rate in rates.items():
                shown.setdefault(by, {}).setdefault(str(block), {})[name] = rate
        return [*shown.items()]


def grid(table: pd.DataFrame) -> tuple[list[int], list[str], Numbers]:
    """Steps, blocks, and the values as Float64[block, step], of a table with a row for each pair.

    Its rows are by step, and in it by block, as `geffect.scores.tidy` orders them.
    """
    blocks = [*map(str, table[blocks_of(table)].cat.categories)]
    values = table["value"].to_numpy(dtype=float).reshape(-1, len(blocks)).T
    return table["step"].tolist()[:: len(blocks)], blocks, values


def opened(runs: Sequence[Run], by: By) -> list[Read]:
    """The runs of a report, each with a name that no other has."""
    for run in runs:
        check_steps(run)
    first, *others = map(held, runs)
    several = [
        Read(run, name, f"run-{number}", by, None if run is first else first)
        for number, (run, name) in enumerate(
            zip((first, *others), names(runs), strict=True), start=1
        )
    ]
    for read in several:
        read.read_all()
        if read.run is not first:
            read.run.let_go()
    first.let_go()
    return several


def check_once(runs: Sequence[Run]) -> None:
    """Refuse a run file that is given twice, also by another path to it."""
    known = set()
    for run in runs:
        there = run.path.stat()
        if (file := (there.st_dev, there.st_ino)) in known:
            raise ValueError(
                f"Run files should be given once each. Found `{run.path}` twice. Leave one out."
            )
        known.add(file)


def names(runs: Sequence[Run]) -> list[str]:
    """The name of each run, with its folder where others are called the same, else its number."""
    said = [run.name for run in runs]
    for longer in (lambda run: f"{run.path.parent.name}/{run.name}", None):
        again = {name for name in said if said.count(name) > 1}
        said = [
            (longer(run) if longer else f"{name} ({number})") if name in again else name
            for number, (run, name) in enumerate(zip(runs, said, strict=True), start=1)
        ]
    return said


def objective_of(manifest: Mapping[str, Any]) -> str:
    """What unlearning minimised, in words.

    >>> objective_of({"objective": {"name": "NPO", "options": {"beta": 0.1}}, "losses": {}})
    'NPO, beta 0.1'
    >>> objective_of({"objective": {"name": "GradDiff", "options": {"forget": {"name": "NPO"}}}})
    'GradDiff, forget NPO'
    >>> objective_of({"losses": {"objective": {"forget": -1.0, "retain": 1.0}}})
    '-1 forget + 1 retain'
    """
    told = manifest.get("objective")
    if isinstance(told, Mapping) and told.get("name"):
        return _declared(told)
    losses = manifest.get("losses")
    declared = losses.get("objective") if isinstance(losses, Mapping) else None
    if isinstance(declared, Mapping):
        return " + ".join(f"{weight:g} {name}" for name, weight in declared.items())
    return "not told"


def _declared(told: Mapping[str, Any]) -> str:
    """An objective with its options, some of which are objectives themselves."""
    options = (f"{name} {_option(value)}" for name, value in (told.get("options") or {}).items())
    return ", ".join([str(told["name"]), *options])


def _option(value: object) -> str:
    if not isinstance(value, Mapping) or not value.get("name"):
        return str(value)
    declared = _declared(value)
    return f"({declared})" if value.get("options") else declared


def rectifier_of(manifest: Mapping[str, Any]) -> str:
    """What rectified the steps, in words.

    >>> rectifier_of({"rectifier": {"rule": "gru", "scope": "model", "space": "update"}})
    'gru, of the model, update space'
    >>> rectifier_of({"rectifier": None})
    'none'
    """
    told = manifest.get("rectifier")
    if not told:
        return "none"
    rule, select = told.get("rule"), told.get("select")
    if rule is None and select is None:
        return "watches only"
    scope = told.get("scope")
    words = [rule, f"of {'the model' if scope == 'model' else f'each {scope}'}" if rule else None]
    words += [f"select {select:g}" if isinstance(select, float) else select and f"select {select}"]
    words += [told.get("space") and f"{told['space']} space"]
    return ", ".join(str(word) for word in words if word)
