"""The gap to approximate retraining: what stands in for a retrained model where there is none."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .resampling import DRAWS, check_bootstrap, numbered, resamples
from .tokens import Floats, TokenTable

METRICS = {"accuracy": "right", "perplexity": "logprob"}
"""What is told of all tokens, and the column of the record that it is of."""

COLUMNS = ("metric", "unseen", "forget", "gap", "low", "high")


def retraining_gap(
    unseen: TokenTable,
    forget: TokenTable,
    *,
    replicates: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How much better the original does on unseen data than the unlearned model on its forget set.

    A model that was trained without the forget set would find it as hard as the original finds
    other data of its kind: then the gap is 0 (approximate retraining, arXiv 2402.15159).

        gap = metric(unseen; original) - metric(forget; unlearned)

    - `unseen`: the record of `evaluate_tokens` of the original, on data of the domain of the forget
      set that no model has seen.
    - `forget`: that of the unlearned model, on the forget set.
    - `replicates`, `level`, `seed`: of a bootstrap that draws the subjects of each set anew.

    Columns metric, unseen, forget, gap, low, high. `accuracy` is the share of all counted tokens
    that are the most likely ones, `perplexity` exp of their mean nll. What is left of the forget
    set makes the gap of accuracy negative and that of perplexity positive; forgetting beyond
    retraining the other way round. No interval, NaN, where a set has a single subject.

    >>> told = {"item": [0, 0], "is_end": False, "logprob": np.log([0.5, 0.125])}
    >>> unseen, forget = (TokenTable(pd.DataFrame({**told, "right": [True, x]}), ("a",), 4)
    ...                   for x in (True, False))
    >>> retraining_gap(unseen, forget)[["metric", "unseen", "forget", "gap"]]
           metric  unseen  forget  gap
    0    accuracy     1.0     0.5  0.5
    1  perplexity     4.0     4.0  0.0
    """
    check_bootstrap(level, replicates)
    _check(unseen, forget)
    rng = np.random.default_rng(seed)
    sides = [_Side.of(table, replicates, rng) for table in (unseen, forget)]
    rows = []
    for metric in METRICS:
        own, other = (side.metric(metric) for side in sides)
        apart = own - other  # of all items, and of those of each draw
        low, high = np.nanquantile(apart[1:], [(1 - level) / 2, (1 + level) / 2])
        if any(side.is_one for side in sides):
            low = high = np.nan
        rows.append((metric, own[0], other[0], apart[0], low, high))
    return pd.DataFrame(rows, columns=[*COLUMNS])


@dataclass(frozen=True)
class _Side:
    """A set: its record, and how many tokens of each item are taken, once and in each draw."""

    table: TokenTable
    tokens: Floats
    is_one: bool

    @classmethod
    def of(cls, table: TokenTable, replicates: int, rng: np.random.Generator) -> "_Side":
        units = numbered(table.subjects)
        drawn = np.vstack([np.ones(len(units)), resamples(units, replicates, rng)])
        return cls(table, drawn * table.lengths, is_one=units.max() == 0)

    def metric(self, name: str) -> Floats:
        """The metric of all items, and of each draw; NaN where that has no token."""
        means = self.table.mean(METRICS[name])
        sums = self.tokens @ np.where(np.isnan(means), 0.0, means)  # of an item without a token
        counts = self.tokens.sum(axis=1)
        found: Floats = np.full(len(counts), np.nan)
        np.divide(sums, counts, out=found, where=counts > 0)
        return np.exp(-found) if name == "perplexity" else found


def _check(unseen: TokenTable, forget: TokenTable) -> None:
    for name, table in (("unseen", unseen), ("forget", forget)):
        if not table.lengths.sum():
            raise ValueError(
                f"`{name}` should have a token that counts. Found none in {table.items} items. See "
                "whether they have answers."
            )
    if unseen.vocabulary != forget.vocabulary:
        raise ValueError(
            "`unseen` and `forget` should be of one vocabulary, for perplexities to be compared. "
            f"Found {unseen.vocabulary} tokens and {forget.vocabulary}. Evaluate models with one "
            "tokenizer."
        )
    if unseen.include_end != forget.include_end:
        raise ValueError(
            "`unseen` and `forget` should count the ends of answers in the same way. Found "
            f"`include_end = {unseen.include_end}` and `{forget.include_end}`. Evaluate both alike."
        )
