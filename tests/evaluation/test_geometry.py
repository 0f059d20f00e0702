"""What first-order effects explain, on models where they explain all, and against loops."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from geffect import Recorder, open_run
from geffect.analysis import predicted_change
from geffect.evaluation.geometry import accumulated, agreement, geometry


def table(values: Any, risk: str = "forget", steps: Any = None, **blocks: Any) -> pd.DataFrame:
    steps = range(len(values)) if steps is None else steps
    named = blocks or {"model": "model"}
    return pd.DataFrame({"step": list(steps), **named, "risk": risk, "value": values})


def measured(values: Any, metric: str, of: str = "forget") -> pd.DataFrame:
    told = {"step": range(len(values)), "set": of, "metric": metric, "value": values}
    return pd.DataFrame(told)


def test_a_linear_model_has_no_gap(tmp_path: Path) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    risks, path = [], tmp_path / "run.h5"

    def risk() -> torch.Tensor:
        return model(torch.tensor([1.0, -2.0, 0.5])).sum()

    with Recorder(model, path, update=True) as recorder:
        for _ in range(10):
            risks.append(risk().item())
            recorder.backward(
                objective={"forget": -1.0}, forget=risk(), retain=model(torch.ones(3)).sum()
            )
            optimizer.step()
            optimizer.zero_grad()
    risks.append(risk().item())
    metrics = pd.concat([measured(risks, "risk"), measured(np.exp(-np.array(risks)), "prob")])
    found = geometry(predicted_change(open_run(path), by="model"), metrics).set_index("metric")
    assert found["rho"].to_dict() == pytest.approx({"risk": -1.0, "prob": 1.0})
    assert found["gap"].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert found["slope"]["risk"] == pytest.approx(-1.0, abs=1e-5)
    assert found["predicted"]["risk"] == pytest.approx(risks[0] - risks[-1], abs=1e-5)
    assert found["measured"]["risk"] == risks[0] - risks[-1] and found["c"].tolist() == [11, 11]


def test_numbers_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(size=12)
    risk, strength = rng.normal(size=13), rng.normal(size=13)
    metrics = pd.concat([measured(risk, "risk"), measured(strength, "es")])
    found = geometry(table(changes), metrics.sample(frac=1.0, random_state=1)).set_index("metric")
    sums = [float(sum(changes[:t])) for t in range(13)]
    for metric, values in (("risk", risk), ("es", strength)):
        assert found["rho"][metric] == pytest.approx(stats.spearmanr(sums, values).statistic)
        assert found["slope"][metric] == pytest.approx(np.polyfit(sums, values, 1)[0])
    apart = sum(abs(a - (risk[0] - r)) for a, r in zip(sums, risk, strict=True))
    assert found["gap"].tolist() == pytest.approx([apart / sum(abs(risk[0] - risk))] * 2)


def test_sums_are_of_the_updates_before_a_step() -> None:
    found = accumulated(table([0.5, -0.25, 1.0], steps=[5, 10, 15]))
    assert found["step"].tolist() == [5, 10, 15, 20]
    assert found["value"].tolist() == [0.0, 0.5, 0.25, 1.25]
    several = pd.concat([table([1.0, 2.0], "forget"), table([3.0, 4.0], "retain")])
    sums = accumulated(several).groupby("risk")["value"].agg(list).to_dict()
    assert sums == {"forget": [0.0, 1.0, 3.0], "retain": [0.0, 3.0, 7.0]}


def test_checkpoints_that_are_few_or_start_late() -> None:
    changes, values = table(np.ones(20)), -2.0 * np.arange(21.0)
    few = geometry(changes, measured(values[:7], "es")).iloc[0]
    assert math.isnan(few["rho"]) and few["c"] == 7 and few["slope"] == pytest.approx(-2.0)
    assert np.isnan(few[["predicted", "measured", "gap"]].astype(float)).all()
    late = geometry(changes, measured(values, "risk").iloc[9:]).iloc[0]
    assert (late["predicted"], late["measured"], late["gap"]) == (11.0, 22.0, 0.5)
    still = geometry(changes, measured(np.ones(21), "risk")).iloc[0]
    assert math.isnan(still["rho"]) and math.isnan(still["gap"]) and still["slope"] == 0.0


def test_an_update_that_is_unknown_ends_what_is_known() -> None:
    changes = table([*[1.0] * 9, math.nan, 1.0])
    found = geometry(changes, measured(-np.arange(12.0), "risk")).iloc[0]
    assert (found["c"], found["rho"], found["gap"]) == (10, pytest.approx(-1.0), 0.0)


def test_layers_agree_where_harm_is_where_it_is_erased() -> None:
    layers = [f"layer {i}" for i in range(5)]
    changes = pd.concat(
        [table([0.5, -1.0 * i], layer=name) for i, name in enumerate(layers)], ignore_index=True
    )
    erased = pd.DataFrame({"layer": layers, "set": "forget", "value": [0.0, 0.2, 0.3, 0.5, 0.9]})
    assert agreement(changes, erased).to_numpy().tolist() == [["forget", pytest.approx(1.0), 5]]
    against = agreement(changes, erased.assign(value=-erased["value"]))
    assert against["rho"].tolist() == pytest.approx([-1.0])
    assert math.isnan(agreement(changes, erased[:2])["rho"].item())
    with pytest.raises(ValueError, match="the run has the layers layer 0"):
        agreement(changes, erased.assign(set="retain"))


def test_what_does_not_belong_together_is_refused() -> None:
    changes, metrics = table(np.ones(9)), measured(np.ones(9), "es")
    cases = [
        (changes, metrics.assign(set="retain"), "Found none such for es of retain"),
        (changes, metrics.assign(step=metrics["step"] + 50), "the steps 0 to 9"),
        (changes, pd.concat([metrics, metrics]), "Found several of `es` on `forget` at step 0"),
        (changes, metrics.drop(columns="set"), "Found no `set`"),
        (changes.drop(columns="risk"), metrics, "Found no column `risk`"),
        (pd.concat([table([1.0], layer="a"), table([1.0], layer="b")]), metrics, "Found 2 blocks"),
    ]
    for given, against, message in cases:
        with pytest.raises(ValueError, match=message):
            geometry(given, against)
