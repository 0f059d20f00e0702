"""Membership: how unlikely each item is to have been trained on, by six scores.

All are higher where an item looks less like training data.
"""

import zlib as compression
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import pandas as pd
from torch import nn

from geffect.data.collate import Item, collate
from geffect.risk import risk_gradient

from .ends import chosen_ends
from .memorised import nll
from .tokens import Floats, TokenTable, check_items, counted_labels, unpadded


def loss(table: TokenTable) -> Floats:
    """nll of each item (arXiv 1709.01604)."""
    return nll(table)


def min_k(table: TokenTable, share: float = 0.4) -> Floats:
    """Min-K%: minus the mean of the lowest log p of each item (arXiv 2310.16789).

    - `share`: k, of whose n tokens max(1, floor(k n)) are taken; 0.4 in MUSE, and also 0.2.
    """
    return _lowest(table, "logprob", share)


def min_k_pp(table: TokenTable, share: float = 0.4) -> Floats:
    """Min-K%++: as `min_k`, of z = (log p - mu) / sigma, not of log p (arXiv 2404.02936)."""
    return _lowest(table, "z", share)


def zlib(table: TokenTable, answers: Sequence[str]) -> Floats:
    """nll of each item over the bytes that its text takes when zlib has compressed it.

    - `answers`: the texts that the items are scored on, in their order (arXiv 2012.07805).
    """
    if len(answers) != table.items:
        raise ValueError(
            f"`answers` should be a text for each of {table.items} items. Found {len(answers)}. "
            "Pass them in the order of the items."
        )
    sizes = [len(compression.compress(text.encode("utf-8"))) for text in answers]
    return nll(table) / np.array(sizes, dtype=np.float64)


def reference(table: TokenTable, of_reference: TokenTable) -> Floats:
    """nll under the model minus nll under a reference: a retrained or a base model (2012.07805).

    - `table`, `of_reference`: records of the same items.
    """
    if not table.is_of_the_tokens_of(of_reference):
        raise ValueError(
            "`of_reference` should be a record of the tokens of `table`. Found other ones. "
            "Evaluate both models on the same items."
        )
    return nll(table) - nll(of_reference)


def grad_norm(
    model: nn.Module,
    items: Sequence[Item],
    *,
    ends: Collection[int] | None = None,
    include_end: bool = False,
    legacy: Literal["open_unlearning"] | None = None,
) -> Floats:
    """The length of grad nll of each item, over all trainable parameters; a backward pass an item.

    - `items`, `ends`, `include_end`: as for `evaluate_tokens`. NaN where nothing is counted.
    - `legacy`: "open_unlearning" takes the mean of the lengths of the tensors instead.

    In eval mode; the model stays as it was. Dot products are summed in float64.
    """
    if legacy not in (None, "open_unlearning"):
        raise ValueError(
            f'`legacy` should be "open_unlearning" or None. Found {legacy!r}. Leave it out.'
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "`model` should have parameters that require a gradient. Found none. Call "
            "`model.requires_grad_(True)`."
        )
    check_items(items)
    ended = chosen_ends(model, ends)
    rows = unpadded(model, items)
    labels = [counted_labels(model, row, set() if include_end else ended) for row in rows]
    found = []
    for item, counted in zip(rows, labels, strict=True):
        if counted is None:
            found.append(float("nan"))
            continue
        vector = risk_gradient(model, collate([{**item, "labels": counted}])).vector
        squares = [float(g.double().square().sum()) for g in vector if g is not None]
        found.append(float(np.mean(np.sqrt(squares)) if legacy else np.sqrt(np.sum(squares))))
    return np.array(found, dtype=np.float64)


def privacy(table: TokenTable, answers: Sequence[str] | None = None) -> pd.DataFrame:
    """The scores of each item that its tokens tell: columns item, subject, attack, value.

    `attack` is one of loss, min_k_0.4, min_k_0.2, min_k_pp_0.4, min_k_pp_0.2 and, with the texts of
    the answers, zlib. NaN for an item without a counted token.

    >>> told = {"item": [0, 0], "is_end": False, "logprob": [-2.0, -1.0], "z": [0.5, 0.0]}
    >>> table = TokenTable(pd.DataFrame(told), ("Ada",), vocabulary=4)
    >>> privacy(table).set_index("attack")["value"].to_dict()
    {'loss': 1.5, 'min_k_0.4': 2.0, 'min_k_0.2': 2.0, 'min_k_pp_0.4': -0.0, 'min_k_pp_0.2': -0.0}
    """
    scores = {"loss": loss(table)}
    for name, kind in (("min_k", min_k), ("min_k_pp", min_k_pp)):
        scores |= {f"{name}_{share}": kind(table, share) for share in (0.4, 0.2)}
    if answers is not None:
        scores["zlib"] = zlib(table, answers)
    return table.tidy(scores, "attack")


def _lowest(table: TokenTable, column: str, share: float) -> Floats:
    if not 0 < share <= 1:
        raise ValueError(
            f"`share` should be above 0 and at most 1. Found {share}. Pass 0.4 for 40 %."
        )
    exact = Fraction(str(float(share)))  # 0.29 of 100 is 29
    counts = [max(1, int(exact * n)) for n in table.lengths.tolist()]
    return np.array(
        [
            -float(np.sort(values)[:count].mean()) if len(values) else float("nan")
            for values, count in zip(table.of_items(column), counts, strict=True)
        ]
    )
