"""What a run file says of the objective, from each recorder."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geffect import Recorder, open_run
from geffect.objectives import NPO, GradDiff, Objective, provenance
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import shallow as tiny
from tests.utils.command_line import Ask
from tests.utils.unlearning_runs import arguments

SAID = {
    "name": "GradDiff",
    "options": {"forget": {"name": "NPO", "options": {"beta": 0.5}}, "weight": 2.0},
    "reduction": {"forget": "sequence_sum of forget", "retain": "token_mean of retain"},
    "reference": {"needs": "likelihoods", "is": None},
}


def recorded(path: Path, objective: Any, **how: Any) -> Path:
    """A run of one more step."""
    model = nn.Linear(2, 1)
    with Recorder(model, path, objective=objective, **how) as recorder:
        recorder.backward(objective={"forget": -1.0}, forget=model(torch.ones(2)).sum())
    return path


def test_a_loop_of_ones_own_tells_its_recorder(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", GradDiff(NPO(0.5), weight=2.0))
    assert open_run(path).manifest["objective"] == SAID
    assert (
        recorded(tmp_path / "none.h5", None)
        and "objective" not in open_run(tmp_path / "none.h5").manifest
    )
    named = recorded(tmp_path / "named.h5", "npo")
    assert open_run(named).manifest["objective"] == provenance(NPO())


def test_a_run_goes_on_with_the_objective_that_it_began_with(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", NPO(0.5))
    recorded(path, NPO(0.5), resume=True)
    recorded(path, None, resume=True)
    assert len(open_run(path).steps) == 3
    with pytest.raises(ValueError, match=r"`objective` should be that of the run in .* Found"):
        recorded(path, NPO(0.4), resume=True)
    assert len(open_run(path).steps) == 3


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"forget": -1.0}, "ga"),
        ("ga", {"forget": -1.0}),
        (GradDiff(weight=0.5), {"forget": -1.0, "retain": 0.5}),
    ],
    ids=str,
)
def test_an_objective_is_the_same_however_it_is_told(first: Any, then: Any, tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.h5", first)
    recorded(path, then, resume=True)
    assert len(open_run(path).steps) == 2
    with pytest.raises(ValueError, match=r"`objective` should be that of the run in .* Found"):
        recorded(path, {"forget": -2.0}, resume=True)


def test_a_trainer_tells_the_recorder_that_it_is_given(tmp_path: Path) -> None:
    model = tiny.llama()
    rows = [{name: x[0] for name, x in tiny.batch(i, rows=1).items()} for i in range(4)]
    with Recorder(model, tmp_path / "run.h5", objective=NPO(0.5)) as recorder:
        make = partial(
            UnlearningTrainer, model, arguments(tmp_path, max_steps=1), forget=rows, retain=rows,
            recorder=recorder,
        )  # fmt: skip
        with pytest.raises(ValueError, match="`objective` should be that of the run"):
            make(objective="ga").train()
        make(objective=NPO(0.5)).train()
    kept = open_run(tmp_path / "run.h5").manifest["objective"]
    assert kept == provenance(NPO(0.5), "a frozen copy of the model")


def test_what_a_file_cannot_keep_is_refused(tmp_path: Path) -> None:
    class Hidden(Objective):
        def __init__(self) -> None:
            object.__setattr__(self, "strength", 3.0)

        def components(self, model: Any, batch: Any, reference: Any = None) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match=r"whose fields are its options.* Found `Hidden`.*strength"):
        recorded(tmp_path / "run.h5", Hidden())


def test_info_shows_it(tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded(tmp_path / "run.h5", GradDiff(NPO(0.5), weight=2.0))
    monkeypatch.setenv("COLUMNS", "160")
    said = ask("info", path).out
    for words in ("name: GradDiff", "beta: 0.5", "weight: 2.0", "sequence_sum of forget",
                  "needs: likelihoods"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("metadata", [{1: "a"}, {"a": [{None: 1}]}, {"a": {"b": ({True: 1},)}}])
def test_keys_that_are_no_text_are_refused(metadata: Any, tmp_path: Path) -> None:
    """JSON would write them as text: 1 and "1" would be one key."""
    with pytest.raises(TypeError, match=r"`metadata` should hold .* not (1|None|True)"):
        recorded(tmp_path / "run.h5", None, metadata=metadata)
