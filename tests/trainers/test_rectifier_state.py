"""A rectified training that stops, and is resumed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from geffect import Recorder, Rectifier, open_run
from geffect.projection import State
from geffect.trainers import rectify
from tests.utils import shallow as tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.rectified_trainers import rectified, shuffled
from tests.utils.trainers import At, same, stop
from tests.utils.unlearning_trainers import GradAscent, GradDiff, unlearner  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "gru": {},
    "select": {"select": 0.3, "state": State(torch.bfloat16)},
    "update": {"space": "update", "scope": "layer", "correction": "retain_adam"},
}
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_training_ends_as_if_it_had_not_been_stopped(
    options: str, retain: bool, tmp_path: Path
) -> None:
    def made(name: str, *callbacks: TrainerCallback, **told: Any) -> Any:
        model = tiny.llama(dropout=0.3)
        kind: Any = GradAscent if retain else GradDiff
        told |= {"kind": kind, "data": kinds.pairs(4)}
        trainer = unlearner(tmp_path / name, model, *callbacks, **told)
        rectify(
            trainer, Rectifier(model, **OPTIONS[options]), retain=shuffled() if retain else None
        )
        return trainer

    whole = made("whole")
    whole.train()
    made("broken", At("on_step_end", 3, stop), **SAVING).train()
    resumed = made("broken", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "out" / "checkpoint-2"))
    assert whole.state.global_step == resumed.state.global_step == 4
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())


def test_a_checkpoint_without_a_rectifier_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unlearner(tmp_path, None, At("on_step_end", 3, stop), **SAVING).train()
    resumed = rectified(tmp_path, **SAVING)
    with caplog.at_level(logging.WARNING, logger="geffect"):
        resumed.train(resume_from_checkpoint=True)
    assert "has no state of a rectifier" in caplog.text
    assert len(resumed.reports.all) == 4


def test_a_checkpoint_of_another_rectifier_is_refused(tmp_path: Path) -> None:
    rectified(tmp_path, **SAVING).train()
    other = rectified(tmp_path, rectifier={"ema": 0.5}, **SAVING)
    with pytest.raises(ValueError, match="set up as"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_recorder_that_goes_on_elsewhere_is_refused(tmp_path: Path) -> None:
    trainer = unlearner(tmp_path, **SAVING)
    path, resume = tmp_path / "run.h5", str(tmp_path / "out" / "checkpoint-2")
    with Recorder(trainer.model, path) as recorder:
        rectify(trainer, Rectifier(trainer.model), recorder=recorder)
        trainer.train()
    steps = open_run(path).steps.tolist()
    for told in ({}, {"next_step": 2}):
        trainer = unlearner(tmp_path, **SAVING)
        with Recorder(trainer.model, path, resume=True, **told) as recorder:
            rectify(trainer, Rectifier(trainer.model), recorder=recorder)
            if told:
                trainer.train(resume_from_checkpoint=resume)
                continue
            with pytest.raises(ValueError, match=r"go on with step 2, as .* Found 6\. Pass"):
                trainer.train(resume_from_checkpoint=resume)
    assert open_run(path).steps.tolist() == steps == [0, 1, 2, 3, 4, 5]


def test_a_training_that_raised_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("out of luck")

    accident = At("on_substep_end", 0, fail)
    trainer = rectified(tmp_path)
    trainer.add_callback(accident)
    with pytest.raises(KeyError):
        trainer.train()
    trainer.remove_callback(accident)
    trainer.train()
    straight = rectified(tmp_path)
    straight.train()
    assert same(straight.model.state_dict(), trainer.model.state_dict())
