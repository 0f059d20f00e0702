"""Intervals: those of a plain bootstrap, for every score, from one reading of the file."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect import Run
from geffect.analysis import conflict, cosine, g_effect, intervals, predicted_change
from geffect.analysis.intervals import ENOUGH_ROWS, share_below
from geffect.checkpoints import estimators
from geffect.store import committed_rows
from tests.utils.batches import write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps of 30, 12 and 1 rows."""
    rng = np.random.default_rng(5)
    grams = {}
    for step, count in {0: 30, 7: 12, 9: 1}.items():
        G = rng.normal(0.3, 1.0, size=(count, 2, 4, 6))
        grams[step] = G @ G.swapaxes(-1, -2)
    return write(tmp_path_factory.mktemp("intervals") / "run.h5", grams)


# Percentiles of means of 30 rows that hold 95 % of the means of new ones: the standard normal
# distribution at -2.04523 sqrt(30 / 29), where 2.04523 is Student's t with 29 degrees of freedom.
LOW_OF_30 = 0.01876


SCORES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (g_effect, {"by": "layer"}),
    (g_effect, {"by": "model"}),
    (cosine, {"a": "forget", "b": "retain", "by": "parameter"}),
    (conflict, {"by": "model"}),
    (predicted_change, {"by": "group"}),
]


@pytest.mark.parametrize(("score", "how"), SCORES)
def test_the_table_is_that_of_the_score_with_three_columns_more(
    run: Run, score: Callable[..., Any], how: dict[str, Any]
) -> None:
    plain, table = score(run, **how), intervals(score, run, replicates=20, **how)
    assert list(table.columns) == [*plain.columns, "rows", "low", "high"]
    assert table.drop(columns=["rows", "low", "high"]).equals(plain)
    assert table["rows"].tolist() == table["step"].map({0: 30, 7: 12, 9: 1}).tolist()
    assert table.attrs == plain.attrs
    alone = table["step"] == 9
    assert table.loc[alone, ["low", "high"]].isna().all(axis=None)
    assert (table.loc[~alone, "low"] <= table.loc[~alone, "high"]).all()


def test_it_is_the_bootstrap_of_a_loop(run: Run) -> None:
    raw = run.read("gram")[:30].sum(axis=1)[:, 0, 1]
    rng = np.random.default_rng(0)
    means = [raw[rng.integers(30, size=30)].mean() for _ in range(4000)]
    table = intervals(g_effect, run, by="model", replicates=500)
    row = table.query("step == 0 and effect == 'unlearning'").iloc[0]
    assert row["value"] == pytest.approx(raw.mean())
    width = np.quantile(means, 1 - LOW_OF_30) - np.quantile(means, LOW_OF_30)
    assert row["low"] == pytest.approx(np.quantile(means, LOW_OF_30), abs=0.1 * width)
    assert row["high"] == pytest.approx(np.quantile(means, 1 - LOW_OF_30), abs=0.1 * width)


def test_a_score_that_is_no_mean_is_computed_from_the_means(run: Run) -> None:
    """The cosine of a replicate comes from its mean Gram matrix, not from cosines of rows."""
    raw = run.read("gram")[:30].sum(axis=1)
    rng = np.random.default_rng(1)
    drawn = np.array([raw[rng.integers(30, size=30)].mean(axis=0) for _ in range(4000)])
    values = drawn[:, 1, 2] / np.sqrt(drawn[:, 1, 1] * drawn[:, 2, 2])
    table = intervals(cosine, run, a="forget", b="retain", by="model", replicates=500)
    width = np.quantile(values, 1 - LOW_OF_30) - np.quantile(values, LOW_OF_30)
    assert table["low"][0] == pytest.approx(np.quantile(values, LOW_OF_30), abs=0.1 * width)
    assert table["high"][0] == pytest.approx(np.quantile(values, 1 - LOW_OF_30), abs=0.1 * width)


@pytest.mark.parametrize("rows", [8, 12])
def test_it_covers_as_often_as_it_says(tmp_path: Path, rows: int) -> None:
    """60 steps with one truth, of products of two means, which are skewed: 95 % would be 57."""
    rng = np.random.default_rng(rows)
    a, b = rng.normal(0.5, 1.0, size=(2, 60, rows, 6))
    products = np.broadcast_to((a * b).sum(-1)[..., None, None, None], (60, rows, 1, 4, 4))
    run = write(tmp_path / "run.h5", dict(enumerate(products)))
    table = intervals(g_effect, run, by="model", replicates=200).query("effect == 'retaining'")
    held = table["low"].le(6 * 0.5**2) & table["high"].ge(6 * 0.5**2)
    assert 0.9 <= held.mean() < 1


@pytest.mark.parametrize("rows", [8, 30, 2000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_theshare_below_is_that_of_student(rows: int, level: float) -> None:
    """The density of t, added up step by step until it is a half of the level on either side."""
    x = np.linspace(0, 60, 600_001)
    freedom = rows - 1
    density = np.exp(-(freedom + 1) / 2 * np.log1p(x**2 / freedom))
    share = np.cumsum(density) - density / 2 - density[0] / 2
    t = np.interp(level, share / share[-1], x)
    expected = NormalDist().cdf(-t * math.sqrt(rows / freedom))
    assert share_below(level, rows) == pytest.approx(expected, rel=1e-3)


def test_few_rows_have_no_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = write(tmp_path / "run.h5", {n: rng.normal(size=(n, 1, 4, 4)) for n in (2, 7, 8)})
    table = intervals(g_effect, run, by="model", replicates=20).set_index("step")
    assert table["rows"].groupby("step").first().to_dict() == {2: 2, 7: 7, 8: 8}
    assert table.loc[[2, 7], ["low", "high"]].isna().all(axis=None)
    assert table.loc[8, ["low", "high"]].notna().all(axis=None)
    assert estimators.ENOUGH_ROWS == ENOUGH_ROWS, "who cuts data into batches aims at that"


def test_a_higher_level_is_wider_and_a_seed_is_a_draw(run: Run) -> None:
    def widths(**how: Any) -> np.ndarray:
        table = intervals(g_effect, run, by="model", replicates=40, **how).query("step < 9")
        return (table["high"] - table["low"]).to_numpy()

    assert (widths(level=0.99) > widths(level=0.5)).all()
    assert (widths(seed=1) == widths(seed=1)).all() and (widths(seed=1) != widths(seed=2)).any()


@pytest.mark.parametrize("across", [True, False])
def test_a_score_may_look_at_all_steps_at_once(run: Run, across: bool) -> None:
    """Replicates are computed together only where that changes nothing."""
    called = []

    def score(run: Run) -> pd.DataFrame:
        table = g_effect(run, by="model")
        called.append(run)
        value = table.groupby("effect", observed=True)["value"].cumsum()
        return table.assign(value=value if across else table["value"])

    table = intervals(score, run, replicates=30)
    rng = np.random.default_rng(0)
    values = [score(run.resampled(rng))["value"] for _ in range(30)]
    first = table["step"] == 0
    low = np.quantile(np.stack(values), LOW_OF_30, axis=0)
    assert table["low"][first].to_numpy() == pytest.approx(low[first.to_numpy()], rel=1e-3)
    assert (len(called) > 60) is across


def test_what_is_undefined_in_a_replicate_has_no_interval(tmp_path: Path) -> None:
    """Squared norms of disjoint batches; some are negative."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(10, 1, 4, 4))
    sure = 5.0 * np.eye(4) + 0.01 * noise
    run = write(tmp_path / "run.h5", {0: 0.1 + noise, 1: sure})
    table = intervals(cosine, run, a="forget", b="retain", by="model", replicates=100)
    assert table["low"].isna().tolist() == [True, False] == table["high"].isna().tolist()


def test_the_file_is_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = []
    opened = committed_rows.opened
    monkeypatch.setattr(
        committed_rows, "opened", lambda path: readings.append(path) or opened(path)
    )
    intervals(g_effect, run, by="model", replicates=50)
    assert len(readings) == 2  # the Gram matrices, and what is stepped


@pytest.mark.parametrize("wrong", [{"level": 0.0}, {"level": 95}, {"replicates": 0}])
def test_a_level_is_a_share(run: Run, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`level` should be between 0 and 1"):
        intervals(g_effect, run, **wrong)
