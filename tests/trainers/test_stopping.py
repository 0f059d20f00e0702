"""A rule that stops in a Trainer: training ends after the step that fired, and as unwatched."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from geffect import Recorder, Rectifier, StopWhen, open_run
from geffect.capture.clauses import Stop
from geffect.capture.rows_seen import Seen
from geffect.objectives import GradientAscent
from geffect.trainers import GEffectCallback, rectify
from tests.utils import shallow as tiny
from tests.utils.trainers import same, trainer
from tests.utils.unlearning_runs import trained
from tests.utils.unlearning_trainers import opposed_pairs, unlearner

PROBES = {"forget": [tiny.batch(50)], "retain": [tiny.batch(51)]}

Trained = Callable[[Path, nn.Module, Any, int], Any]
"""A training in a folder, of a model, by a rule, of at most so many steps."""


class Late(StopWhen):
    """A rule that looks at nothing before the third step."""

    def see(self, seen: Seen) -> Stop | None:
        return super().see(seen) if seen.step >= 2 else None


def recorded(folder: Path, stop: StopWhen | None) -> Any:
    return partial(Recorder, path=folder / "run.h5", update=True, stop=stop)


def by_callback(folder: Path, model: nn.Module, stop: StopWhen | None, steps: int) -> Any:
    watching = [GEffectCallback(folder / "run.h5", probes=PROBES, stop=stop)] if stop else []
    training = trainer(folder, model, *watching, max_steps=steps, lr_scheduler_type="constant")
    training.train()
    return training


def by_unlearning(folder: Path, model: nn.Module, stop: StopWhen | None, steps: int) -> Any:
    recorder = recorded(folder, stop) if stop else None
    return trained(folder, model, GradientAscent(), recorder=recorder, max_steps=steps)


def by_rectifying(folder: Path, model: nn.Module, stop: StopWhen | None, steps: int) -> Any:
    training = unlearner(
        folder, model, data=opposed_pairs(), max_steps=steps, lr_scheduler_type="constant"
    )
    recorder = recorded(folder, stop) if stop else None
    probes = {"forget": PROBES["forget"]} if stop else None
    rectify(training, Rectifier(model), recorder=recorder, probes=probes)
    training.train()
    return training


TRAININGS: dict[str, Trained] = {
    "callback": by_callback,
    "unlearning trainer": by_unlearning,
    "rectify": by_rectifying,
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_trainer_ends_after_the_step_that_fired(kind: str, tmp_path: Path) -> None:
    start, train = tiny.llama(), TRAININGS[kind]
    stop = Late(free_forgetting=1e9, vocabulary=10**6)
    ended = train(tmp_path, copy.deepcopy(start), stop, 5)
    assert ended.state.global_step == 3
    plain = train(tmp_path / "plain", copy.deepcopy(start), None, 3)
    assert same(plain.model.state_dict(), ended.model.state_dict())
    run = open_run(tmp_path / "run.h5")
    assert (run.state, run.steps.tolist()) == ("complete", [0, 1, 2])
    assert run.table("stop")["step"].tolist() == [2]
    assert run.table("stop")["clause"].tolist() == ["free forgetting"]


def test_probes_that_a_clause_looks_at_are_asked_for_before_training(tmp_path: Path) -> None:
    model = tiny.llama()
    watching = GEffectCallback(
        tmp_path / "run.h5", probes={"forget": PROBES["forget"]}, stop=StopWhen(exchange_rate=0.5)
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`stop` should be a rule on what.*Record retain too"):
        trainer(tmp_path, model, watching).train()
    assert same(before, model.state_dict())
