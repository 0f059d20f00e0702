"""Settings: what the file of a run says that it minimised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geffect import Recorder, open_run
from geffect.analysis import setting
from geffect.objectives import CATALOGUE, Combination, Objective, named


def recorded(path: Path, objective: Any = None, **how: Any) -> Path:
    model = nn.Linear(3, 1)
    with Recorder(model, path, objective=objective, **how) as recorder:
        forget, retain = model(torch.eye(3)[0]).sum() ** 2, model(torch.ones(3)).sum() ** 2
        recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ga", ("GA", None)),
        ("wga", ("WGA", None)),
        ("npo", ("NPO", None)),
        ("tnpo", ("TNPO", None)),
        ("po", ("PO", None)),
        ("rmu", ("RMU", None)),
        ("ga+gd", ("GA", "GD")),
        ("ga+kl", ("GA", "KL")),
        ("npo+rr", ("NPO", "RR")),
        ("wga+proxy-kl", ("WGA", "proxy KL")),
    ],
)
def test_both_parts_by_their_names(tmp_path: Path, name: str, says: tuple[str, str]) -> None:
    found = setting(open_run(recorded(tmp_path / "run.h5", named(name))))
    assert (found.objective, found.regulariser) == says
    assert not found.rectified and found.seed is None


def test_options_of_both_parts(tmp_path: Path) -> None:
    objective = named("npo+kl", {"beta": 0.5, "weight": 3.0})
    found = setting(open_run(recorded(tmp_path / "run.h5", objective, metadata={"seed": 4})))
    assert found.options == {"beta": 0.5, "weight": 3.0, "legacy_kl": False}
    assert found.name == "NPO + KL" and found.seed == 4


@pytest.mark.parametrize(
    ("weights", "says", "options"),
    [
        ({"forget": -1.0}, "GA", {}),
        ({"forget": -2.0, "retain": 1.0}, "GA + GD", {"weight": 0.5}),
        ({"forget": 1.0}, "unknown", {}),
        ({"forget": -1.0, "retain": -1.0}, "unknown", {}),
        ({"forget": -1.0, "world": 1.0}, "unknown", {}),
    ],
)
def test_weights_of_risks(
    tmp_path: Path, weights: dict[str, float], says: str, options: dict[str, float]
) -> None:
    found = setting(open_run(recorded(tmp_path / "run.h5", Combination(weights))))
    assert found.name == says and found.options == options


def test_of_a_run_without_an_objective_its_losses_tell(tmp_path: Path) -> None:
    assert setting(open_run(recorded(tmp_path / "run.h5"))).name == "GA"


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_objective_has_a_setting(tmp_path: Path, name: str) -> None:
    objective: Objective = CATALOGUE[name]
    found = setting(open_run(recorded(tmp_path / "run.h5", objective)))
    assert found.objective
