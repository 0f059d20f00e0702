"""Evaluations of others beside a run: read as they are written, over what the updates predict."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from geffect import Recorder, Run, open_run
from geffect.analysis import agreement, join, predicted_change, read_evaluations
from geffect.analysis.accumulated import before_steps, summed_before
from geffect.capture import every
from geffect.capture.schedule import Schedule
from tests.utils.command_line import Ask

STEPS = 10


EACH = every(1)


def recorded(path: Path, when: Schedule = EACH) -> Run:
    """A linear model: what its updates predict is what happens."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.eye(3).double()[0], torch.tensor([0.3, 0.1, 0.0]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with Recorder(model, path, update=True, when=when) as recorder:
        for _ in range(STEPS):
            recorder.backward(
                objective={"forget": -1.0},
                forget=lambda: model(x).sum(),
                retain=lambda: model(y).sum(),
            )
            optimizer.step()
            optimizer.zero_grad()
    return open_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("join") / "run.h5")


def checkpoint(folder: Path, step: int, name: str = "TOFU_SUMMARY", **held: Any) -> Path:
    path = folder / f"checkpoint-{step}" / "evals" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held), encoding="utf-8")
    return path


def test_files_of_both_kinds_are_read_with_the_step_of_their_checkpoint(tmp_path: Path) -> None:
    detailed = {"agg_value": 0.25, "value_by_index": {"0": {"prob": 0.25}}}
    files = [
        checkpoint(tmp_path, 120, model_utility=0.5, forget_quality=None),
        checkpoint(tmp_path, 60, model_utility=0.6),
        checkpoint(tmp_path, 60, "MUSE_EVAL", privleak={"agg_value": -12}, forget_knowmem=detailed),
        checkpoint(tmp_path, 60, "TOFU_EVAL", model_utility={"agg_value": 0.6}),
    ]
    table = read_evaluations([*files[:3], str(files[3])])
    assert table.to_numpy().tolist() == [
        [60, "TOFU", "model_utility", 0.6],
        [60, "MUSE", "privleak", -12.0],
        [60, "MUSE", "forget_knowmem", 0.25],
        [120, "TOFU", "model_utility", 0.5],
    ]
    last = tmp_path / "last=one.json"
    last.write_text('{"model_utility": 0.4}')
    assert read_evaluations([f"180={last}"]).to_numpy().tolist() == [
        [180, "last=one", "model_utility", 0.4]
    ]


def test_change_is_the_sum_of_all_updates_before_a_checkpoint(run: Run) -> None:
    steps = [0, 1, 4, 7, STEPS]
    metrics = pd.DataFrame({"step": steps, "metric": "ES", "value": np.linspace(1, 0, 5)})
    joined = join(run, metrics)
    of_steps = predicted_change(run, by="model")
    for row in joined.to_dict("records"):
        own = of_steps[(of_steps["risk"] == row["risk"]) & (of_steps["step"] < row["step"])]
        assert row["change"] == pytest.approx(own["value"].sum(), abs=1e-12)
        loss = run.losses()[row["risk"]]
        if row["step"] < STEPS:
            assert row["measured"] == pytest.approx(loss[0] - loss[row["step"]])
        else:
            assert np.isnan(row["measured"])


def test_of_a_linear_model_the_gap_is_0_and_the_correlation_1(run: Run) -> None:
    steps = np.arange(STEPS)
    risen = run.losses()["forget"] - run.losses()["forget"][0]
    metrics = pd.DataFrame({"step": steps, "metric": "loss", "value": 3 * risen})
    table = agreement(join(run, metrics)).set_index("risk")
    assert table.loc["forget", "rho"] == pytest.approx(-1)
    assert table.loc["forget", "slope"] == pytest.approx(-3)
    assert table["gap"].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert table["checkpoints"].tolist() == [STEPS, STEPS]
    few = agreement(join(run, metrics[:7]))
    assert few["rho"].isna().all()


def test_steps_that_were_not_captured_are_stood_for(tmp_path: Path) -> None:
    whole, some = recorded(tmp_path / "whole.h5"), recorded(tmp_path / "some.h5", every(3))
    metrics = pd.DataFrame({"step": [5, 10], "metric": "ES", "value": [1.0, 0.0]})
    exact, estimate = (join(run, metrics)["change"].to_numpy() for run in (whole, some))
    changes = predicted_change(some, by="model").query("risk == 'forget'")["value"].to_numpy()
    assert estimate[0] == pytest.approx(3 * changes[0] + 2 * changes[1])
    assert estimate[2] == pytest.approx(3 * changes[:3].sum() + changes[3])
    np.testing.assert_allclose(estimate, exact, rtol=0.3)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("[1]", "should hold metrics by their names. Found list"),
        ("{}", "should hold metrics by their names"),
        ("{", "should be JSON"),
        ('{"a": "high"}', "`a` in .* should be a number, or have one as `agg_value`. Found 'high'"),
        ('{"a": "0.5"}', "Found '0.5'"),
        ('{"a": Infinity}', "Found inf"),
        ('{"a": 1, "a": 2}', "should be JSON. Found: `a` stands in it more than once"),
        ("[" * 10**5, "should be JSON"),
        ('{"a": true}', "Found True"),
        ('{"a": null, "b": {"agg_value": null}}', "a metric that was computed. Found a, b"),
    ],
    ids=[
        "list",
        "empty",
        "broken",
        "text",
        "digits",
        "infinite",
        "twice",
        "deep",
        "true",
        "nothing",
    ],
)
def test_files_that_hold_no_metrics_are_refused(held: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "TOFU_SUMMARY.json"
    path.write_text(held)
    with pytest.raises(ValueError, match=said):
        read_evaluations([f"5={path}"])


def test_files_without_a_step_or_that_contradict_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "TOFU_SUMMARY.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"should be in the folder of its checkpoint.*Pass 60="):
        read_evaluations([path])
    other = checkpoint(tmp_path, 5, a=2)
    with pytest.raises(ValueError, match=r"`a` of TOFU at step 5 should have one value. Found 1"):
        read_evaluations([f"5={path}", other])
    with pytest.raises(ValueError, match="Found 6 before it, and checkpoint-5 in its path"):
        read_evaluations([f"6={other}"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"value": ["1.0", "0.5"]}, "`value` of an evaluation should be a number.* Found '1.0' of"),
        ({"value": [1.0, math.inf]}, "Found inf of `ES`"),
        ({"value": [1.0, 1j]}, "Found .*j.* of `ES`"),
        ({"value": [True, False]}, "Found True of `ES`"),
        ({"step": [2, 2]}, "a metric once at each step. Found 2 rows of `ES` at step 2"),
        ({"step": [2, 2], "suite": "TOFU"}, "Found 2 rows of `TOFU ES` at step 2"),
        ({"step": ["2", "3"]}, "`step` of an evaluation should be the whole number.* Found '2'"),
        ({"step": [2, math.nan]}, "Found nan"),
        ({"step": [True, False]}, "Found True"),
    ],
    ids=["text", "infinite", "complex", "true", "twice", "suite", "digits", "nan", "a true step"],
)
def test_tables_that_say_nothing_certain_are_refused(
    columns: dict[str, Any], said: str, run: Run
) -> None:
    plain = {"step": [0, 1], "metric": "ES", "value": [1.0, 0.5]}
    with pytest.raises(ValueError, match=said):
        join(run, pd.DataFrame({**plain, **columns}))


def test_what_was_not_computed_is_no_number_and_a_suite_may_be_missing(run: Run) -> None:
    metrics = pd.DataFrame({"step": [0, 1, 2], "metric": "ES", "value": [1.0, None, np.nan]})
    joined = join(run, metrics.assign(suite=[None, np.nan, None]))
    assert joined["value"].isna().tolist() == [False, False, True, True, True, True]
    assert agreement(joined)["checkpoints"].tolist() == [1, 1]


def test_a_checkpoint_of_another_run_is_refused(run: Run, example_run: Any) -> None:
    late = pd.DataFrame({"step": [STEPS + 1], "metric": "ES", "value": [0.1]})
    with pytest.raises(ValueError, match=r"from 0 to 10 updates. Found 11"):
        join(run, late)
    with pytest.raises(ValueError, match=r"the whole number of updates before it. Found 2\.5"):
        join(run, late.assign(step=2.5))
    with pytest.raises(ValueError, match="a table of metrics with the columns"):
        join(run, late.drop(columns="value"))
    with pytest.raises(ValueError, match="update"):
        join(example_run(), late)


def test_the_command(ask: Ask, run: Run, tmp_path: Path) -> None:
    files = [
        checkpoint(
            tmp_path, step, model_utility=0.6 - step / 50, extraction_strength=1 / (1 + step)
        )
        for step in range(STEPS)
    ]
    picture = tmp_path / "join.png"
    said = ask("join", run.path, *files, "-o", picture)
    assert (said.code, said.err) == (0, "")
    assert "10 checkpoints, after 0 to 9 updates" in said.out
    assert "TOFU model_utility" in said.out and "TOFU extraction_strength" in said.out
    assert picture.stat().st_size > 1000
    assert all(f"{column}:" in said.out for column in ("rho", "slope", "gap"))
    rows = ask("join", run.path, *files, "--format", "tsv").out.splitlines()
    assert rows[0].split("\t") == ["step", "suite", "metric", "risk", "change", "measured", "value"]
    assert len(rows) == 1 + 2 * 2 * STEPS
    refused = ask("join", run.path, tmp_path / "none.json")
    assert refused.code == 1 and "checkpoint-60/evals" in refused.err


def test_numbers_are_those_of_a_loop_over_checkpoints() -> None:
    rng = np.random.default_rng(0)
    change, value = rng.normal(size=13), rng.normal(size=13)
    steps = range(13)
    columns = {"step": steps, "suite": "", "metric": "es", "risk": "forget", "measured": change}
    joined = pd.DataFrame({**columns, "change": change, "value": value})
    row = agreement(joined.sample(frac=1.0, random_state=1)).iloc[0]
    assert row["rho"] == pytest.approx(stats.spearmanr(change, value).statistic)
    assert row["slope"] == pytest.approx(np.polyfit(change, value, 1)[0])
    assert (row["gap"], row["checkpoints"]) == (0.0, 13)
    half = agreement(joined.assign(measured=2 * change)).iloc[0]
    assert half["gap"] == pytest.approx(0.5)
    assert agreement(joined.assign(value=1.0))["rho"].isna().all()


def test_an_update_that_is_unknown_ends_what_is_known(run: Run) -> None:
    changes = np.ones((len(run.steps), 1))
    changes[6] = np.nan
    sums = summed_before(run, before_steps(run, range(STEPS + 1)), changes)[:, 0]
    np.testing.assert_array_equal(sums, [0, 1, 2, 3, 4, 5, 6, *[np.nan] * 4])
