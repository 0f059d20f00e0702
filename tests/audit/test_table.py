"""Means over items, and the bootstrap that bounds them, against loops."""

from itertools import product
from weakref import ref

import numpy as np
import pandas as pd
import pytest

from geffect.audit.table import (
    KEYS,
    interval,
    parts_of,
    per_item,
    resampled_means,
    summed,
    units_of,
    value_of,
)
from geffect.evaluation.resampling import DRAWS, KEPT, resamples

SUBJECTS = [*"aabbccddee"]


def rows(values: object, model: str = "original", subjects: list[str] = SUBJECTS) -> pd.DataFrame:
    return per_item("memorised", "nll", "forget", model, values, subjects)  # type: ignore[arg-type]


def test_means_of_draws_are_those_of_a_loop() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 0.0, 1.0, 7.0, 3.0, 2.0])
    weights = resamples(units_of(SUBJECTS), draws=50)
    naive = []
    for weight in weights:
        drawn = [v for v, w in zip(values, weight, strict=True) for _ in range(int(w))]
        naive.append(np.nanmean(drawn))
    np.testing.assert_allclose(resampled_means(values, weights), naive, rtol=1e-12)


def test_few_draws_are_kept_and_none_of_many_items() -> None:
    for items, kept in ((KEPT // DRAWS, True), (KEPT // DRAWS + 1, False)):
        units = np.arange(items)
        found = resamples(units)
        assert (resamples(units) is found) == kept
        assert np.array_equal(resamples(units), found)
    for count in range(5, 9):
        first = ref(resamples(np.arange(count), draws=count))
        for others in (1, 2):
            resamples(np.arange(others), draws=1)
        assert first() is None


def test_what_is_drawn_for_the_same_items_is_drawn_once_and_never_written_to() -> None:
    units = units_of(SUBJECTS)
    found = resamples(units, draws=50)
    assert resamples(units.astype(np.int32), draws=50) is found
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0
    assert not np.array_equal(found, resamples(units, draws=50, seed=1))
    assert not np.array_equal(found, resamples(units[::-1], draws=50))
    generator = np.random.default_rng(0)
    first, second = (resamples(units, 50, generator) for _ in range(2))
    assert np.array_equal(first, found) and not np.array_equal(second, found)


def test_parts_are_those_of_a_loop_over_rows() -> None:
    values = np.random.default_rng(0).normal(size=(3, 10))
    models = ("unlearned", "original", "another")
    tables = [rows(v, model) for v, model in zip(values, models, strict=True)]
    mixed = pd.concat(tables).sample(frac=1, random_state=2)
    naive: dict[tuple[str, ...], tuple[list[float], list[str]]] = {}
    for row in mixed.to_dict("records"):
        own, subjects = naive.setdefault(tuple(row[name] for name in KEYS), ([], []))
        own.append(row["value"])
        subjects.append(row["subject"])
    found = {key: (own.tolist(), subjects) for key, own, subjects in parts_of(mixed)}
    assert found == naive and [*found] == [*naive]
    assert not [*parts_of(mixed[:0])]


def test_subjects_are_drawn_whole() -> None:
    weights = resamples(units_of(SUBJECTS), draws=100)
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    assert (weights.sum(axis=1) == len(SUBJECTS)).all()


def test_items_are_drawn_where_subjects_are_few() -> None:
    assert units_of(["a"] * 4 + ["b"] * 4).tolist() == [*range(8)]


def test_the_same_items_are_drawn_for_every_model() -> None:
    values = np.arange(10.0)
    table = summed(pd.concat([rows(values), rows(values + 3, "unlearned")]))
    original = value_of(table, model="original")
    unlearned = value_of(table, model="unlearned")
    assert original is not None and unlearned is not None
    for name in ("value", "low", "high"):
        assert unlearned[name] - original[name] == pytest.approx(3)
    assert value_of(table, model="retrained") is None


def test_the_order_of_items_changes_no_mean() -> None:
    table = rows(np.random.default_rng(0).normal(size=10))
    mixed = summed(table.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(mixed[["value", "n"]], summed(table)[["value", "n"]])
    np.testing.assert_allclose(mixed[["low", "high"]], summed(table)[["low", "high"]], atol=0.2)


def test_an_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    subjects = [str(i) for i in range(40)]
    for _ in range(200):
        row = value_of(summed(rows(draw.normal(size=40), subjects=subjects), draws=300))
        assert row is not None
        covered += row["low"] <= 0 <= row["high"]
    assert 0.88 < covered / 200 < 0.99


def test_what_has_no_interval() -> None:
    one = summed(rows([2.0], subjects=["a"])).iloc[0]
    none = summed(rows([np.nan] * 10)).iloc[0]
    assert (one["value"], one["n"]) == (2.0, 1)
    assert np.isnan(one["low"]) and np.isnan(none["value"]) and none["n"] == 0
    assert np.isnan(interval(np.array([np.nan, np.nan, 1.0]))).all()


def test_values_without_their_items_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each of the 10 items"):
        rows([1.0])
    with pytest.raises(ValueError, match="none called `metric`"):
        summed(rows([1.0] * 10).drop(columns="metric"))
    for key, nothing in product(KEYS, (None, np.nan)):
        with pytest.raises(ValueError, match=rf"set and model of each.*'{key}': (None|nan)"):
            summed(pd.concat([rows([1.0] * 10), rows([2.0] * 10).assign(**{key: nothing})]))
    with pytest.raises(ValueError, match="each once"):
        summed(pd.concat([rows([1.0] * 10)] * 2))
    with pytest.raises(ValueError, match="Found 2"):
        value_of(summed(pd.concat([rows([1.0] * 10), rows([1.0] * 10, "unlearned")])))
