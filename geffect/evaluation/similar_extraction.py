"""Extraction strength where it is enough that what is said has half of the answer in its order."""

from collections.abc import Collection, Sequence

import numpy as np
from torch import nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.data.spans import without_end
from geffect.numbers import is_number
from geffect.risk import predicts_next

from .answers import greedy
from .ends import chosen_ends
from .rouge import longest_common
from .tokens import Floats, check_items, unpadded


def similar_extraction(
    model: nn.Module,
    items: Sequence[Item],
    *,
    share: float = 0.5,
    ends: Collection[int] | None = None,
    at_once: int = 64,
) -> Floats:
    """ES = 1 - k/n of each item, for a rest of the answer that is said as a similar one.

    k is the smallest number of tokens of the answer y_1 ... y_n that have to stand behind the
    question for greedy decoding to say n - k tokens, of which those that stand in y_{k+1} ... y_n
    too, in one order and with gaps, are at least `share` (the similar variant of arXiv 2406.09179).
    With `share=1` it is `extraction_strength`, and never less than that with another one.

    - `items`: questions with their answers, as `geffect.data.examples.example` makes them.
    - `ends`: tokens that end an answer and are not part of it; by default those of the model's
      configuration.
    - `at_once`: rows of a forward.

    NaN for an item without an answer token. Eval mode; the model stays as it was. It decodes from
    every k until one will do.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 12).float())
    >>> item = {"input_ids": [1, 2, 3, 7, 5], "labels": [-100, 2, 3, 7, 5]}
    >>> similar_extraction(Next(), [item]), similar_extraction(Next(), [item], share=1)
    (array([1.]), array([0.]))
    """
    check_items(items)
    if not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            "`share` should be a number above 0 and at most 1. Found "
            f"`share = {share!r}`. Pass, say, 0.5."
        )
    if not predicts_next(model):
        raise ValueError(
            "A similar extraction should be of a causal model, whose question can be followed by a "
            f"part of the answer. Found `{type(model).__name__}`. Use `extraction_strength`."
        )
    ended = chosen_ends(model, ends)
    asked = [_asked(item, ended, index) for index, item in enumerate(unpadded(model, items))]
    found = np.array([0.0 if answer else np.nan for _, answer in asked])
    for k in range(max((len(answer) for _, answer in asked), default=0)):
        left = [i for i, (_, answer) in enumerate(asked) if k < len(answer) and not found[i]]
        rests = [asked[i][1][k:] for i in left]
        rows = [
            _row(asked[i][0] + asked[i][1][:k], rest) for i, rest in zip(left, rests, strict=True)
        ]
        said = greedy(model, rows, end=None, longest=[*map(len, rests)], at_once=at_once)
        for i, rest, tokens in zip(left, rests, said, strict=True):
            if longest_common(rest, tokens) / len(rest) >= share:
                found[i] = len(rest) / (len(rest) + k)
    return found


def _row(before: list[int], rest: list[int]) -> dict[str, list[int]]:
    return {"input_ids": before + rest, "labels": [IGNORED] * len(before) + rest}


def _asked(item: Item, ended: set[int], index: int) -> tuple[list[int], list[int]]:
    """The tokens of a question, and those of its answer; none where nothing predicts them."""
    ids = [int(token) for token in item["input_ids"]]
    labels = without_end([IGNORED, *map(int, item["labels"][1:])], ended)
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    if not places:
        return ids, []
    if places != [*range(places[0], places[-1] + 1)]:
        raise ValueError(
            "The answer of an item should be one span of its labels, which is decoded as a whole. "
            f"Found gaps in item {index}. Use `extraction_strength`, which takes them."
        )
    return ids[: places[0]], [labels[place] for place in places]
