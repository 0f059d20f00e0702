"""What is left of the rest: divergence from the original, kept shares, perplexity, choices."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from geffect.batch import IGNORED, check_one_answer, on_device
from geffect.data.collate import Item
from geffect.risk import label_logits, undisturbed

from .ends import chosen_ends
from .tokens import (
    TIE,
    Floats,
    TokenTable,
    alike,
    check_items,
    check_numbers,
    counted_labels,
    evaluate_tokens,
    in_float64,
)

WINDOW = 512
"""The tokens of a window of running text."""

_AT_ONCE = 2**24


def divergence(
    original: nn.Module,
    model: nn.Module,
    items: Sequence[Item],
    *,
    batch: int = 32,
    ends: Collection[int] | None = None,
    include_end: bool = False,
) -> Floats:
    """KL(original || model), the mean over the counted tokens of each item, in nats.

    sum_v p_v (log p_v - log q_v) with p of the original and q of the model, over all that could be
    said at the place of a token. 0 for the same model. `items`, `batch`, `ends` and `include_end`
    are those of `evaluate_tokens`; NaN for an item without a counted token. Both models stay as
    they were.
    """
    check_items(items)
    ended = set() if include_end else chosen_ends(original, ends)
    labels = [counted_labels(original, item, ended) for item in items]
    counted = [
        {**item, "labels": own or [IGNORED] * len(item["labels"])}
        for item, own in zip(items, labels, strict=True)
    ]
    found = np.full(len(items), np.nan)
    with undisturbed(original), undisturbed(model), torch.no_grad():
        for chosen, collated in alike(original, counted, batch):
            check_one_answer(collated, "a divergence of its tokens")
            first, second = (_scored_logits(one, collated) for one in (original, model))
            if first[0].shape[-1] != second[0].shape[-1]:
                raise ValueError(
                    "`model` should say the tokens of `original`. Found "
                    f"{second[0].shape[-1]} tokens for {first[0].shape[-1]}. Pass models of one "
                    "vocabulary."
                )
            values = _divergences(first[0], second[0]).cpu().numpy()
            row = first[1].cpu().numpy()
            found[chosen] = np.bincount(row, weights=values) / np.bincount(row)
    return found


def kept_share(values: ArrayLike, before: ArrayLike) -> float:
    """The mean of a metric over its mean before unlearning, over the items that have both.

    - `values`, `before`: one metric of the same items, such as extraction strength, under the model
      and under the original. NaN where that had nothing to keep.

    >>> kept_share([0.5, 0.0], [1.0, 1.0])
    0.25
    """
    now, then = (np.asarray(x, dtype=np.float64) for x in (values, before))
    if now.shape != then.shape:
        raise ValueError(
            f"`values` and `before` should be of the same items. Found shapes {now.shape} and "
            f"{then.shape}. Evaluate both models on the same items."
        )
    known = ~(np.isnan(now) | np.isnan(then))
    total = then[known].sum()
    return float(now[known].sum() / total) if total > 0 else float("nan")


def windows(text: str, tokenizer: Any, length: int = WINDOW) -> list[dict[str, list[int]]]:
    """Running text as items of `length` tokens that do not overlap, the first of each not scored.

    The last window is shorter; one of a single token, which nothing predicts, is left out.
    """
    if length < 2:
        raise ValueError(f"`length` should be at least 2. Found {length}. Pass, say, {WINDOW}.")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    items = [{"input_ids": part, "labels": [IGNORED, *part[1:]]} for part in parts]
    found = [item for item in items if len(item["labels"]) > 1]
    if not found:
        raise ValueError(
            f"`text` should have two tokens or more. Found {len(ids)}. Pass running text."
        )
    return found


def perplexity(table: TokenTable) -> float:
    """exp of the mean nll of all counted tokens: a long window weighs more than a short one.

    - `table`: the record of `windows`, with `include_end=True`: running text has no answers to end.

    >>> told = {"item": [0, 0, 1], "is_end": False, "logprob": np.log([0.5, 0.5, 0.25])}
    >>> round(perplexity(TokenTable(pd.DataFrame(told), ("a", "b"), vocabulary=4)), 4)
    2.5198
    """
    return float(np.exp(-table.counted["logprob"].mean()))


def multiple_choice(
    model: nn.Module,
    options: Sequence[Sequence[Item]],
    right: Sequence[int],
    *,
    batch: int = 32,
    ends: Collection[int] | None = None,
) -> pd.DataFrame:
    """Whether the right one of several answers to each question is the most likely one.

    - `options`: for each question its answers, as items with the same question.
    - `right`: the index of the right one among them.

    Columns item, metric, value. `metric` is `accuracy_sum`, by the log-likelihood of the whole
    answer; `accuracy_mean`, by that of a token; `probability` of the right one among the options,
    by the whole; and `chance`, one over the number of options. Answers that are as likely as the
    right one share its point. Accuracy at chance is no sign of forgetting where utility fell too.
    NaN where an answer is empty.
    """
    counts = [len(own) for own in options]
    if len(right) != len(counts) or any(
        count < 2 or not 0 <= index < count for count, index in zip(counts, right, strict=False)
    ):
        raise ValueError(
            "`options` should be two answers or more to each question, and `right` the index of "
            f"one of them. Found {counts[:5]} options and {list(right)[:5]}. Number them from 0."
        )
    table = evaluate_tokens(
        model, [item for own in options for item in own], batch=batch, ends=ends
    )
    means = table.mean("logprob")
    places = np.cumsum(counts)[:-1]
    rows = []
    for mean, whole, at in zip(
        np.split(means, places), np.split(means * table.lengths, places), right, strict=True
    ):
        rows.append((_point(whole, at), _point(mean, at), _share(whole, at), 1 / len(mean)))
    names = ("accuracy_sum", "accuracy_mean", "probability", "chance")
    found = np.array(rows, dtype=np.float64).reshape(-1, len(names))
    return pd.concat(
        [
            pd.DataFrame({"item": np.arange(len(found)), "metric": name, "value": found[:, place]})
            for place, name in enumerate(names)
        ],
        ignore_index=True,
    )


def _point(likelihoods: Floats, right: int) -> float:
    """1 where the right one is the most likely; of several that are as likely its share."""
    if np.isnan(likelihoods).any():
        return float("nan")
    most = likelihoods.max()
    best = (likelihoods == most) | (likelihoods > most - TIE)
    return float(best[right] / best.sum())


def _share(likelihoods: Floats, right: int) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(1 / np.exp(likelihoods - likelihoods[right]).sum())


def _scored_logits(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits at the places of scored tokens, and the row of each."""
    device = next(model.parameters(), torch.empty(0)).device
    logits, labels = label_logits(model, on_device(batch, device))
    row, column = torch.nonzero(labels != IGNORED).unbind(1)
    found = logits[row, column]
    check_numbers(model, found)
    return found, row


def _divergences(first: Tensor, second: Tensor) -> Tensor:
    """KL at each place, `Float64[place]`, from logits `Float[place, token]` of both."""
    at_once = max(1, _AT_ONCE // first.shape[-1])
    parts = []
    for start in range(0, len(first), at_once):
        log_p, log_q = (
            in_float64(logits[start : start + at_once]).log_softmax(-1)
            for logits in (first, second)
        )
        log_q, p = log_q.to(log_p.device), log_p.exp()
        apart = (log_p - log_q).where(p > 0, torch.zeros_like(p))  # 0 log 0 = 0
        parts.append((p * apart).sum(-1))
    return torch.cat(parts)
