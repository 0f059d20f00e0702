"""Degenerate output: what a model says by itself that no original would, told without a classifier.

It does not see fluent nonsense, another language, or refusals.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.risk import predicts_next
from geffect.risk.limits import positions_of

from .answers import greedy, length_of_answer, questions_of
from .ends import chosen_ends
from .memorised import nll
from .tokens import Floats, check_items, evaluate_tokens

LEAST = 24
"""The tokens that any answer may have."""

TIMES = 3
"""How many times longer than the right one an answer may be."""

REPEATED = 0.5
"""The share of repeated pairs of tokens beyond which an answer repeats itself."""

UNLIKELY = 0.75
"""The share of a uniform guess's nll beyond which the original would not have said it."""


def degenerate(
    model: nn.Module,
    items: Sequence[Item],
    original: nn.Module,
    *,
    ends: Collection[int] | None = None,
    batch: int = 32,
) -> pd.DataFrame:
    """Whether what the model says to each question is degenerate: columns item, metric, value.

    `metric` is one of these, 1 where it holds and 0 where not; means are shares of the answers.

    - `empty`: nothing is said.
    - `repeats`: more than half of the pairs of neighbouring tokens are repetitions.
    - `unlikely`: mean nll under the original, behind the same question, above 0.75 ln V.
    - `endless`: no token ends it within three times the right answer, or 24 tokens if that is more.
    - `degenerate`: any of these.
    - `distinct`: one over how many questions get the very same answer, so that the mean is the
      number of distinct answers over the number of answers.

    - `items`: questions with their answers; NaN for one without an answer.
    - `original`: the model before unlearning, with the same tokens.
    - `ends`: tokens that end an answer, by default those of the model's configuration. Without any,
      nothing is endless.

    Answers are greedy. Both models stay as they were.
    """
    check_items(items)
    ended = chosen_ends(model, ends)
    lengths = [length_of_answer(item, ended) for item in items]
    asked = [index for index, length in enumerate(lengths) if length is not None]
    if not asked:
        raise ValueError(
            f"`items` should have answers. Found none in {len(items)} items. Mark them in the "
            "labels."
        )
    limits = [max(LEAST, TIMES * (lengths[index] or 0)) for index in asked]
    chosen = [items[index] for index in asked]
    said = greedy(model, chosen, end=ended, longest=limits, at_once=batch)
    often = Counter(map(tuple, said))
    risks, vocabulary = _nll_of(original, chosen, said, batch)
    told: dict[str, Any] = {
        "empty": [not answer for answer in said],
        "repeats": [_repeated(answer) > REPEATED for answer in said],
        "unlikely": risks > UNLIKELY * math.log(vocabulary),
        "endless": [
            bool(ended) and len(answer) >= limit
            for answer, limit in zip(said, _room(model, chosen, limits), strict=True)
        ],
    }
    told["degenerate"] = np.any([*told.values()], axis=0)
    shares = {**told, "distinct": [1 / often[tuple(answer)] for answer in said]}
    tables = []
    for name, values in shares.items():
        whole = np.full(len(items), np.nan)
        whole[asked] = np.asarray(values, dtype=np.float64)
        each = {"item": np.arange(len(items)), "metric": name, "value": whole}
        tables.append(pd.DataFrame(each))
    return pd.concat(tables, ignore_index=True)


def _nll_of(
    original: nn.Module, items: Sequence[Item], said: Sequence[Sequence[int]], batch: int
) -> tuple[Floats, int]:
    """nll of each answer under the original, NaN for an empty one, and how many tokens it knows."""
    is_next = predicts_next(original)
    rows = []
    for question, answer in zip(questions_of(original, items), said, strict=True):
        before = question if is_next else []
        ids = [*question, *answer] if is_next else question
        rows.append({"input_ids": ids, "labels": [*[IGNORED] * len(before), *answer]})
    whole = [index for index, answer in enumerate(said) if answer]
    found = np.full(len(items), np.nan)
    if not whole:
        return found, 2
    table = evaluate_tokens(original, [rows[index] for index in whole], batch=batch, ends=[])
    found[whole] = nll(table)
    return found, table.vocabulary


def _room(model: nn.Module, items: Sequence[Item], limits: Sequence[int]) -> list[int]:
    """The most tokens that could be said to each question, in the positions that a model has."""
    is_next, positions = predicts_next(model), positions_of(model)
    starts = [len(question) if is_next else 1 for question in questions_of(model, items)]
    return [min(limit, positions - start) for limit, start in zip(limits, starts, strict=True)]


def _repeated(answer: Sequence[int]) -> float:
    """rep2 = 1 - distinct pairs / pairs of neighbouring tokens; 0 without a pair."""
    found = list(pairwise(answer))
    return 1 - len(set(found)) / len(found) if found else 0.0
