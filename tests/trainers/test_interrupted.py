"""A Trainer that is recorded or rectified and interrupted anywhere: all is left whole."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from geffect import Recorder, Rectifier, open_run
from geffect.store import RunFileError, validate
from geffect.trainers import GEffectCallback, rectify
from tests.utils import shallow as tiny
from tests.utils import trainers
from tests.utils.interrupts import grads_of, hooks_left, interrupted_at_line, moments, same
from tests.utils.unlearning_trainers import opposed_pairs, unlearner

PROBES = {"forget": tiny.batch(0), "retain": tiny.batch(70)}


class States(TrainerCallback):
    """What a training goes on from, at each step's begin and at the end."""

    def __init__(self) -> None:
        self.rectifier: Rectifier | None = None
        self.lines = [0]  # that have come, and do not count here
        self.stepped: list[list[Tensor | None]] = []
        self.remembered: list[list[Tensor | None]] = []

    def on_step_begin(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        come = self.lines[0]
        self.stepped.append(stepped(model, optimizer))
        self.remembered.append(remembered(self.rectifier))
        self.lines[0] = come

    on_train_end = on_step_begin


def stepped(model: Any, optimizer: Any) -> list[Tensor | None]:
    """The parameters, and what the optimizer keeps of them."""
    state = {} if optimizer is None else optimizer.state
    kept = [value for p in model.parameters() for value in state.get(p, {}).values()]
    return [*(p.detach().clone() for p in model.parameters()), *(v.clone() for v in kept)]


def remembered(rectifier: Rectifier | None) -> list[Tensor | None]:
    """The averages of a rectifier."""
    if rectifier is None:
        return []
    kept = rectifier.state_dict()["memory"]["average.retain"]
    return [None if v is None else v.clone() for v in kept.values()]


@dataclass
class Watched:
    """A Trainer that somebody watches or rectifies, and what is to be closed."""

    trainer: Any
    states: States = field(default_factory=States)
    close: Callable[[], None] = lambda: None

    def train(self) -> None:
        self.trainer.train()
        self.close()

    def end(self) -> None:
        """A rectifier looks at the steps of all optimizers for as long as it is attached."""
        if self.states.rectifier is not None:
            self.states.rectifier.detach()


OPTIONS = {"num_train_epochs": 1, "logging_steps": 100}


def recorded(path: Path) -> Watched:
    callback = GEffectCallback(path, probes=PROBES, log=False)
    model = tiny.llama(dropout=0.25)
    return Watched(trainers.trainer(path.parent, model, callback, **OPTIONS))


def rectified(path: Path, *, watches: bool = False, **options: Any) -> Watched:
    model = tiny.gpt2()
    callbacks = [GEffectCallback(path, probes=PROBES, log=False)] if watches else []
    made = Watched(unlearner(path.parent, model, *callbacks, data=opposed_pairs(), **OPTIONS))
    made.states.rectifier = Rectifier(model, **options)
    rectify(made.trainer, made.states.rectifier)
    return made


def rectified_and_recorded(path: Path) -> Watched:
    made = Watched(unlearner(path.parent, tiny.gpt2(), data=opposed_pairs(), **OPTIONS))
    recorder = Recorder(made.trainer.model, path)
    made.states.rectifier = Rectifier(made.trainer.model)
    rectify(made.trainer, made.states.rectifier, recorder=recorder)
    made.close = recorder.close
    return made


SETUPS: dict[str, Callable[[Path], Watched]] = {
    "recorded": recorded,
    "rectified": rectified,
    "its forget part": lambda path: rectified(path, part="forget"),
    "rectified and recorded": rectified_and_recorded,
    "rectified beside a callback": lambda path: rectified(path, watches=True),
    "in update space": lambda path: rectified(path, watches=True, space="update"),
}


@cache
def undisturbed(name: str, folder: Path) -> tuple[States, np.ndarray | None, int]:
    """The states, rows and lines of a training that nobody interrupts."""
    path = folder / name / "a.h5"
    path.parent.mkdir()
    made = SETUPS[name](path)
    made.trainer.add_callback(made.states)
    with interrupted_at_line(0, KeyboardInterrupt) as made.states.lines:
        made.train()
    made.end()
    lines = made.states.lines
    return made.states, open_run(path).gram() if path.exists() else None, lines[0]


# Python says so of what comes while it forgets an object, and loses it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SETUPS)
def test_an_interrupt_at_any_line_leaves_training_and_file_whole(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    states, rows, lines = undisturbed(name, tmp_path_factory.getbasetemp())
    for number, error in moments(lines, few=1):
        where = f"{name}, line {number}, {error.__name__}"
        path = tmp_path / str(number) / "a.h5"
        path.parent.mkdir()
        made = SETUPS[name](path)
        # What comes while Python forgets an object is lost.
        with suppress(error, RunFileError), interrupted_at_line(number, error):
            made.train()
        model = made.trainer.model
        now = stepped(model, made.trainer.optimizer)
        at = [i for i, s in enumerate(states.stepped) if len(s) == len(now) and same(s, now)]
        assert at, where
        averages = states.remembered[at[0] : at[-1] + 2]
        assert any(same(remembered(made.states.rectifier), known) for known in averages), where
        grads = grads_of(model)
        assert all(g is None for g in grads) or all(g is not None for g in grads), where
        assert all(p.requires_grad for p in model.parameters()), where
        assert torch.is_grad_enabled(), where
        made.end()
        kept = [hook for hook in hooks_left(model) if "geffect" in getattr(hook, "__module__", "")]
        assert len(kept) <= 2, where
        if path.exists():
            assert rows is not None
            assert validate(path).whole, where
            found = open_run(path).gram()
            assert np.array_equal(found[:-1], rows[: len(found[:-1])], equal_nan=True), where
            known = ~np.isnan(found)
            assert np.array_equal(found[known], rows[: len(found)][known]), where
            assert at[0] - 1 <= len(found) <= at[-1] + 1, where
