"""The tables of an audit: a value for each item, and their means with intervals.

A battery gives rows of `battery, metric, set, model, item, subject, value`. Means over items have
the interval of a bootstrap that draws the same items for all models, so that their differences are
paired.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from geffect.evaluation.resampling import DRAWS, resamples

PER_ITEM = ("battery", "metric", "set", "model", "item", "subject", "value")
"""The columns of a table of items."""

KEYS = ("battery", "metric", "set", "model")
SUMMED = (*KEYS, "value", "low", "high", "n")
"""The columns of a table of means: `n` items have a value; `low` and `high` bound 95 %."""

FEWEST = 5
"""So many subjects, at least, are drawn as a whole; of fewer the items are drawn."""

LIMITS = (2.5, 97.5)
"""The percentiles of an interval."""


def per_item(
    battery: str,
    metric: str,
    of: str,
    model: str,
    values: ArrayLike,
    subjects: Sequence[str],
    numbers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The rows of one metric: a value for each item of the set `of`, in its order.

    `numbers` are those of the items, from 0 if left out.

    >>> per_item("memorised", "nll", "forget", "original", [0.5], ["Ada"])["value"].tolist()
    [0.5]
    """
    taken = np.asarray(values, dtype=np.float64)
    if taken.shape != (len(subjects),):
        raise ValueError(
            f"`values` of `{metric}` should be one for each of the {len(subjects)} items of "
            f"`{of}`. Found the shape {taken.shape}. Give NaN where an item has none."
        )
    return pd.DataFrame(
        {
            "battery": battery,
            "metric": metric,
            "set": of,
            "model": model,
            "item": np.arange(len(taken)) if numbers is None else list(numbers),
            "subject": list(subjects),
            "value": taken,
        }
    )


def units_of(subjects: Sequence[str]) -> NDArray[np.int64]:
    """What a bootstrap draws as a whole: the number of its subject for each item.

    Of fewer than `FEWEST` subjects it is the items themselves: an interval from two authors says
    nothing. With one item there is nothing to draw.

    >>> units_of(["a", "a", "b"]), units_of([*"aabcde"])
    (array([0, 1, 2]), array([0, 0, 1, 2, 3, 4]))
    """
    codes, found = pd.factorize(np.array([*map(str, subjects)], dtype=object))
    return np.arange(len(codes)) if len(found) < FEWEST else codes.astype(np.int64)


def resampled_means(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean of each draw over the items that have a value; NaN where none has.

    >>> resampled_means(np.array([1.0, np.nan, 4.0]), np.array([[1.0, 1, 1], [0, 3, 0]]))
    array([2.5, nan])
    """
    there = ~np.isnan(values)
    counts = weights @ there
    sums = weights @ np.where(there, values, 0.0)
    means: NDArray[np.float64] = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """The bounds of 95 % of the draws; NaN where too few have a value.

    >>> interval(np.arange(201.0))
    (5.0, 195.0)
    """
    there = drawn[~np.isnan(drawn)]
    if len(there) < len(drawn) / 2 or not len(there):
        return float("nan"), float("nan")
    low, high = np.percentile(there, LIMITS)
    return float(low), float(high)


def summed(items: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """The mean of every metric, set and model over items, with its interval.

    Items are drawn as they stand in the table, those of all models in one order. A set with one
    item has no interval: NaN.

    >>> rows = per_item("memorised", "nll", "forget", "original", [1.0, 3.0], ["a", "b"])
    >>> summed(rows)[["value", "low", "high", "n"]].to_numpy().tolist()
    [[2.0, 1.0, 3.0, 2.0]]
    """
    rows = []
    for key, values, subjects in parts_of(items):
        there = ~np.isnan(values)
        low = high = float("nan")
        if there.sum() > 1:
            weights = resamples(units_of(subjects), draws, seed)
            low, high = interval(resampled_means(values, weights))
        mean = float(values[there].mean()) if there.any() else float("nan")
        rows.append((*key, mean, low, high, int(there.sum())))
    return pd.DataFrame(rows, columns=[*SUMMED])


def parts_of(
    items: pd.DataFrame,
) -> Iterator[tuple[tuple[str, ...], NDArray[np.float64], list[str]]]:
    """Of each metric, set and model the keys, the values and the subjects, as they first come.

    >>> rows = per_item("memorised", "nll", "forget", "original", [1.0, 3.0], ["a", "b"])
    >>> [(key[1], values.tolist(), subjects) for key, values, subjects in parts_of(rows)]
    [('nll', [1.0, 3.0], ['a', 'b'])]
    """
    check_items(items)
    number = items.groupby([*KEYS], sort=False).ngroup().to_numpy()
    keys = items[[*KEYS]].to_numpy(dtype=object)
    values = items["value"].to_numpy(dtype=np.float64)
    subjects = items["subject"].to_numpy(dtype=object)
    order = np.argsort(number, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        if len(own):
            yield tuple(map(str, keys[own[0]])), values[own], subjects[own].tolist()


def with_mean(items: pd.DataFrame, models: Sequence[str], name: str) -> pd.DataFrame:
    """The table of items with the mean over some models, item by item, as a further one.

    An item without a value under one of them has the mean of the others.

    >>> rows = [per_item("memorised", "nll", "forget", m, [m == "a"], ["x"]) for m in "ab"]
    >>> with_mean(pd.concat(rows), ["a", "b"], "both")["value"].tolist()
    [1.0, 0.0, 0.5]
    """
    own = items[items["model"].isin([*models])]
    keys = [column for column in PER_ITEM if column not in ("model", "value")]
    means = own.groupby(keys, sort=False)["value"].mean().reset_index().assign(model=name)
    return pd.concat([items, means[[*PER_ITEM]]], ignore_index=True)


def value_of(table: pd.DataFrame, **keys: str) -> Mapping[str, float] | None:
    """The one row of a table of means with these keys, as `value`, `low`, `high` and `n`; or None.

    >>> rows = per_item("memorised", "nll", "forget", "original", [1.0, 3.0], ["a", "b"])
    >>> value_of(summed(rows), metric="nll", set="forget", model="original")["value"]
    2.0
    """
    found = table
    for column, wanted in keys.items():
        found = found[found[column] == wanted]
    if len(found) > 1:
        raise ValueError(
            f"A row of an audit should be told by {', '.join(KEYS)}. Found {len(found)} with "
            f"{keys}. Name more of these."
        )
    return None if found.empty else {c: float(found.iloc[0][c]) for c in SUMMED[len(KEYS) :]}


def check_items(items: pd.DataFrame) -> None:
    """Refuse a table that is none of items, and items that are not named or told twice."""
    missing = [column for column in PER_ITEM if column not in items]
    if missing:
        raise ValueError(
            f"A table of items should have the columns {', '.join(PER_ITEM)}. Found none called "
            f"`{missing[0]}`. Make its rows with geffect.audit.table.per_item."
        )
    unnamed = items[items[[*KEYS]].isna().any(axis=1)]
    if len(unnamed):
        raise ValueError(
            "A table of items should name the battery, metric, set and model of each. Found one "
            f"with {unnamed.iloc[0][[*KEYS]].to_dict()}. Name what is missing, or leave the item "
            "out."
        )
    twice = items[items.duplicated([*KEYS, "item"])]
    if len(twice):
        raise ValueError(
            "A table of items should have each once for a battery, metric, set and model. Found "
            f"item {twice.iloc[0]['item']} twice in {twice.iloc[0][[*KEYS]].to_dict()}. Leave one "
            "of them out."
        )
