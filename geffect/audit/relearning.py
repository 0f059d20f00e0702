"""Relearning: what comes back while a model is trained a little further, on one of three sources.

`benign` trains on what should be kept. A model that has forgotten learns no more of the rest by it,
and one that hides does. `half` trains on every other item and asks for those between; `full` trains
on what it asks for, and is an upper bound. Where all models learn the names and the templates of a
set again, `half` and `full` tell little: they are reported, and never merged with `benign`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, nan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from geffect.data.collate import Item, collate
from geffect.evaluation.memorised import nll as item_nll
from geffect.evaluation.tokens import evaluate_tokens, unpadded
from geffect.numbers import counted, is_number, is_whole
from geffect.risk import mean_nll, scored_tokens

from .adapters import deployed
from .kept import check_weights, kept
from .teaching import taught, teach

__all__ = [
    "QUICK",
    "RelearningBudget",
    "as_attacks",
    "curve",
    "nll_of_items",
    "relearning",
    "summary",
    "taught",
    "teach",
]

Floats = NDArray[np.float64]

Metric = Callable[[nn.Module, Sequence[Item]], Floats]
"""A value for each item; NaN for one that has none."""

BENIGN, HALF, FULL = "benign", "half", "full"
SOURCES = (BENIGN, HALF, FULL)
"""What is trained on: the retain set; every other forget item, then the others; all of them."""


@dataclass(frozen=True)
class RelearningBudget:
    """How far an attack goes: every source with every rate and every seed.

    - `steps`: after so many steps it is measured, and it ends after the last.
    - `rates`: learning rates, as multiples of that of the unlearning.
    - `seeds`: of the order of the items. A set of no more than a batch has no order: more seeds
      would find the same, so the first is taken alone.
    - `batch`: the items of a step.

    >>> QUICK.steps, QUICK.sources
    ((4, 16, 48), ('benign',))
    """

    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 48)
    rates: tuple[float, ...] = (1.0, 0.3, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    sources: tuple[str, ...] = SOURCES
    batch: int = 16

    def __post_init__(self) -> None:
        for name, right, told in (
            ("steps", lambda x: is_whole(x, 1), "whole numbers above 0"),
            ("rates", lambda x: is_number(x) and x > 0, "numbers above 0"),
            ("seeds", lambda x: is_whole(x, 0), "whole numbers"),
            ("sources", SOURCES.__contains__, f"some of {', '.join(SOURCES)}"),
        ):
            values = getattr(self, name)
            several = isinstance(values, tuple) and values and len({*values}) == len(values)
            if not (several and all(map(right, values))):
                raise ValueError(
                    f"`{name}` of RelearningBudget should be a tuple of {told}, each once. Found "
                    f"{values!r}. Pass such as {getattr(RelearningBudget, name)!r}."
                )
        if not is_whole(self.batch, 1):
            raise ValueError(
                "`batch` of RelearningBudget should be a whole number above 0. Found "
                f"{self.batch!r}. Pass, say, 16."
            )


QUICK = RelearningBudget(steps=(4, 16, 48), rates=(1.0,), seeds=(0,), sources=(BENIGN,))
"""What the audit of a quick budget trains: further on what should stay, at one rate."""


def nll_of_items(model: nn.Module, items: Sequence[Item]) -> Floats:
    """-(1/n) sum_i log p_i of each answer, without the token that ends it, in nats per token."""
    return item_nll(evaluate_tokens(model, items))


def relearning(
    model: nn.Module,
    forget: Sequence[Item],
    retain: Sequence[Item],
    *,
    learning_rate: float,
    budget: RelearningBudget | None = None,
    metric: Metric = nll_of_items,
    report: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """What a metric says of each forget item while the model is trained further.

    All weights are trained as `teach` does it, in eval mode. An adapter is merged before.

    - `forget`: what is asked for; `retain`: what `benign` trains on. Items as
      `geffect.data.examples.example` makes them.
    - `learning_rate`: that of the unlearning. Where it trained an adapter, that is too much for all
      weights: pass one at which whole models are tuned, such as 1e-5.
    - `budget`: how far, by default all of `RelearningBudget`.
    - `metric`: called with the model and some of the forget items.
    - `report`: told after each step how many of how many are done.

    Returns a row for each source, rate, seed, step and item: columns source, rate, seed, step,
    item, value. Step 0 is the model as it was. A run whose loss or weights are not finite has NaN
    from there on. The model ends with every bit as it was, with its gradients, its mode, and the
    random numbers. Meanwhile it takes the memory of its training: gradients, the state of AdamW,
    and one copy of the weights on the host.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=super().forward(input_ids))
    >>> _, model = torch.manual_seed(0), Table(4, 4)
    >>> kept, gone = ({"input_ids": ids, "labels": [-100, ids[1]]} for ids in ([0, 1], [2, 3]))
    >>> _ = nn.init.zeros_(model.weight)
    >>> table = relearning(model, [gone], [kept], learning_rate=0.1, budget=QUICK)
    >>> table[["source", "step", "value"]].round(2)
       source  step  value
    0  benign     0   1.39
    1  benign     4   1.39
    2  benign    16   1.39
    3  benign    48   1.39
    """
    budget = budget or RelearningBudget()
    check_weights(model, "Relearning")
    if not (is_number(learning_rate) and learning_rate > 0):
        raise ValueError(
            f"`learning_rate` should be positive. Found {learning_rate!r}. Pass that of the "
            "unlearning."
        )
    whole = deployed(model)
    runs = [*_runs(whole, forget, retain, budget)]
    before = np.asarray(metric(whole, forget), dtype=np.float64)
    last = max(budget.steps)
    counted = _Counted(last * sum(len(run.parts) for run in runs), report)
    tables = []
    with kept(whole.parameters()) as put_back:
        for run in runs:
            found = {step: np.full(len(forget), np.nan) for step in (0, *sorted(budget.steps))}
            found[0][:] = before
            for learned, asked in run.parts:

                def look(step: int, asked: Any = asked, found: Any = found) -> None:
                    if step in found:
                        some = [forget[i] for i in asked]
                        found[step][asked] = _measured(metric, whole, some)
                    counted.more(1)

                taken = teach(
                    whole,
                    learned,
                    steps=last,
                    learning_rate=learning_rate * run.rate,
                    batch=budget.batch,
                    seed=run.seed,
                    after=look,
                )
                put_back()
                counted.more(last - taken)
            tables.append(run.table(found))
    return pd.concat(tables, ignore_index=True)


def curve(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over items and seeds after each number of steps: columns source, rate, step, value.

    Of runs that diverged, and items that have no value, it is the mean of the others.
    """
    return _means(table, ["source", "rate", "step"])


def summary(table: pd.DataFrame, *, rises: bool = False) -> pd.DataFrame:
    """What each source and rate brings back at most, and on the way.

    - `rises`: whether the metric is larger where more is known; NLL is smaller.

    Columns source, rate; `before`, at step 0; `best`, the strongest of all, with its `step`; and
    `area`, the mean of the curve over its steps, that is the area below it by their number.

    >>> run = {"source": "benign", "rate": 1.0, "step": [0, 1, 3], "value": [4.0, 2.0, 3.0]}
    >>> summary(pd.DataFrame(run)).round(2)
       source  rate  before  best  step  area
    0  benign   1.0     4.0   2.0     1  2.67
    """
    rows = []
    for (source, rate), part in curve(table).groupby(["source", "rate"], sort=False):
        values, steps = part["value"].to_numpy(), part["step"].to_numpy()
        there = ~np.isnan(values)
        best, step, area = nan, 0, nan
        if there.any():
            place = int((np.nanargmax if rises else np.nanargmin)(values))
            best, step = float(values[place]), int(steps[place])
        if there.all() and steps[-1] > steps[0]:
            area = float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
        rows.append((source, rate, float(values[0]), best, step, area))
    return pd.DataFrame(rows, columns=["source", "rate", "before", "best", "step", "area"])


def as_attacks(table: pd.DataFrame) -> pd.DataFrame:
    """Each source, rate and number of steps as an attack of its own: columns attack, item, value.

    A value is the mean over the seeds. Step 0 is no attack.

    >>> row = {"source": "benign", "rate": 1.0, "seed": 0, "step": 48, "item": 0, "value": 2.0}
    >>> as_attacks(pd.DataFrame([row])).to_dict("records")
    [{'attack': 'relearning benign, 48 steps, rate x 1', 'item': 0, 'value': 2.0}]
    """
    means = _means(table[table["step"] > 0], ["source", "step", "rate", "item"])
    names = [
        f"relearning {source}, {counted(step, 'step')}, rate x {rate:g}"
        for source, step, rate in zip(means["source"], means["step"], means["rate"], strict=True)
    ]
    return pd.DataFrame({"attack": names, "item": means["item"], "value": means["value"]})


def _means(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return table.groupby(keys, sort=False)["value"].mean().reset_index()


@dataclass(frozen=True)
class _Run:
    """A source, rate and seed, and what is trained on for which of the forget items."""

    source: str
    rate: float
    seed: int
    parts: Sequence[tuple[Sequence[Item], list[int]]]

    def table(self, found: Mapping[int, Floats]) -> pd.DataFrame:
        """The rows of what was found after each number of steps."""
        columns: dict[str, Any] = {
            "source": self.source,
            "rate": self.rate,
            "seed": self.seed,
            "step": np.repeat([*found], [len(values) for values in found.values()]),
            "item": np.concatenate([np.arange(len(values)) for values in found.values()]),
            "value": np.concatenate([*found.values()]),
        }
        return pd.DataFrame(columns)


def _runs(
    model: nn.Module, forget: Sequence[Item], retain: Sequence[Item], budget: RelearningBudget
) -> Iterator[_Run]:
    every = [*range(len(forget))]
    parts: dict[str, list[tuple[Sequence[Item], list[int]]]] = {
        BENIGN: [(retain, every)],
        HALF: [(forget[1::2], every[::2]), (forget[::2], every[1::2])],
        FULL: [(forget, every)],
    }
    for source, rate in product(budget.sources, budget.rates):
        scored = [
            ([item for item in taught if _is_scored(model, item)], asked)
            for taught, asked in parts[source]
        ]
        if not all(taught and asked for taught, asked in scored):
            told = "`retain`" if source == BENIGN else "`forget`"
            raise ValueError(
                f"Relearning from `{source}` should have items with an answer to train on, and "
                f"items to ask for. Found {' and '.join(str(len(x)) for x, _ in scored)} to train "
                f"on. Pass more of {told}, or leave the source out."
            )
        has_order = any(len(taught) > budget.batch for taught, _ in scored)
        for seed in budget.seeds if has_order else budget.seeds[:1]:
            yield _Run(source, rate, seed, scored)


def _measured(metric: Metric, model: nn.Module, items: Sequence[Item]) -> Floats | float:
    """What the metric says of the items; NaN where it refuses a model that has diverged."""
    try:
        return metric(model, items)
    except ValueError:
        if isfinite(mean_nll(model, collate([item for item in items if _is_scored(model, item)]))):
            raise
        return nan


def _is_scored(model: nn.Module, item: Item) -> bool:
    return bool(scored_tokens(model, collate(unpadded(model, [item]))).any())


class _Counted:
    """How many of all steps are done."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._total, self._report, self._done = total, report, 0

    def more(self, steps: int) -> None:
        """Further steps are done, or will not be taken."""
        self._done += steps
        if steps and self._report is not None:
            self._report(self._done, self._total)
