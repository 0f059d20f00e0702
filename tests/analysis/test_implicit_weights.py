"""Implicit weights on their way from an objective through a run file to a table."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from geffect import Recorder, open_run
from geffect.analysis import implicit_weights
from geffect.objectives import NPO, FrozenModel, SharedForward, WeightedGradientAscent
from geffect.plots import trajectory
from tests.utils import reference
from tests.utils import shallow as tiny


def test_the_weights_of_wga_are_those_of_the_answer_tokens(tmp_path: Path) -> None:
    model, wga = tiny.llama(), WeightedGradientAscent(2.0)
    pairs = [{"forget": tiny.batch(s, padding=s), "retain": tiny.batch(9)} for s in range(3)]
    expected = []
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for pair in pairs:
            samples = reference.token_log_p(model, pair["forget"])
            p = np.exp([log_p.item() for sample in samples for log_p in sample])
            expected.append((np.mean(p**2), np.median(p**2), np.max(1 / p)))
            shared = SharedForward(model)
            recorder.backward(
                objective=wga(shared, pair), weights=wga.implicit_weights(shared, pair)
            )
    table = implicit_weights(open_run(tmp_path / "run.h5"))
    rows = table.set_index(["weight", "statistic", "step"])["value"]
    for step, (mean, median, largest) in enumerate(expected):
        assert rows["weight", "mean", step] == pytest.approx(mean, rel=1e-4)
        assert rows["weight", "median", step] == pytest.approx(median, rel=1e-4)
        assert rows["inverse confidence", "max", step] == pytest.approx(largest, rel=1e-4)
    mean = table[table["statistic"] == "mean"].drop(columns="statistic")
    axes = trajectory(mean, ax=Figure().subplots())
    assert axes.get_ylabel() == "implicit weight"


def test_the_weights_of_npo_begin_at_one(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    npo, before = NPO(0.1), FrozenModel.copied(model)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective=npo(model, pair, before), weights=npo.implicit_weights(model, pair, before)
        )
    rows = implicit_weights(open_run(tmp_path / "run.h5")).query("weight == 'weight'")
    assert rows["value"].tolist() == pytest.approx([1.0] * 4)


def test_a_run_without_weights_is_refused(recorded: Path) -> None:
    with pytest.raises(ValueError, match=r"should hold implicit weights.* Found .* Record"):
        implicit_weights(open_run(recorded))
