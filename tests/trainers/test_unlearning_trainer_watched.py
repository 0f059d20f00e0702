"""The trainer for unlearning, watched, stopped and resumed."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.capture import every
from geffect.data.collate import collate
from geffect.data.pairs import Pairing
from geffect.objectives import NPO, GradDiff, GradientAscent, Objective
from geffect.projection import SAGO, State
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.trainers import At, same
from tests.utils.unlearning_runs import (
    FORGET,
    OBJECTIVES,
    RETAIN,
    SEED,
    WEIGHT,
    flat_gradient,
    states,
    trained,
    windows,
)

# Watching changes nothing.


RECTIFIERS: dict[str, Callable[[nn.Module], Rectifier | None]] = {
    "no rectifier": lambda model: None,
    "gru": Rectifier,
    "update space": lambda model: Rectifier(model, space="update", correction="retain_adam"),
}


@pytest.mark.parametrize(
    ("name", "rectified"),
    [*[(name, "no rectifier") for name in OBJECTIVES], ("npo+gd", "gru"), ("ga", "update space")],
)
def test_watched_training_is_the_same_to_the_last_bit(
    name: str, rectified: str, tmp_path: Path
) -> None:
    objective, _ = OBJECTIVES[name]
    ends = []
    recorded = partial(Recorder, path=tmp_path / "run.h5", overwrite=True)
    for recorder in (None, partial(recorded, when=every(3)), partial(recorded, update=True)):
        model = tiny.llama(dropout=0.2)
        options = {"optim": "adamw_torch"}
        rectifier = RECTIFIERS[rectified](model)
        trainer = trained(
            tmp_path, model, objective, rectifier=rectifier, recorder=recorder, **options
        )
        ends.append([states(model), trainer.optimizer.state_dict()["state"]])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_only_steps_that_are_due_cost_their_risks(tmp_path: Path) -> None:
    model, seen = tiny.llama(), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    recorder = partial(Recorder, path=tmp_path / "run.h5", when=every(2))
    trainer = trained(tmp_path, model, GradientAscent(), recorder=recorder)
    # Windows of 2 and 1: on the recorded ones a forward more, over retain data.
    assert len(seen) == 2 * (2 * 2 + 1)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert ["retain_nll" in log for log in logged] == [True, False, True, False]
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 2]


def test_a_combination_costs_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    backward = Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda *a, **k: passes.append(1) or backward(*a, **k))

    def count(objective: Objective, *, rectified: bool, watched: bool) -> int:
        passes.clear()
        model = tiny.llama()
        path = tmp_path / f"{len(list(tmp_path.glob('*.h5')))}.h5"
        trained(
            tmp_path,
            model,
            objective,
            rectifier=Rectifier(model) if rectified else None,
            recorder=partial(Recorder, path=path) if watched else None,
            max_steps=1,
            gradient_accumulation_steps=1,
        )
        return len(passes)

    ga, graddiff, npo = GradientAscent(), GradDiff(), NPO()
    for objective, alone, rectified, both in ((ga, 1, 2, 2), (graddiff, 1, 2, 2), (npo, 1, 2, 3)):
        assert count(objective, rectified=False, watched=False) == alone
        assert count(objective, rectified=True, watched=False) == rectified
        assert count(objective, rectified=True, watched=True) == both
    # Watched, for GA the gradient is a multiple of one that is taken; a sum is taken by itself.
    assert count(ga, rectified=False, watched=True) == 2
    assert count(graddiff, rectified=False, watched=True) == 3


def test_what_is_recorded(tmp_path: Path) -> None:
    model = tiny.gpt2()
    start, path = copy.deepcopy(model), tmp_path / "run.h5"
    objective = GradDiff(weight=WEIGHT)
    trainer = trained(
        tmp_path,
        model,
        objective,
        rectifier=Rectifier(model),
        recorder=partial(Recorder, path=path),
    )
    run = open_run(path)
    assert run.state == "complete"
    assert run.sources == ("objective", "forget", "retain", "retain_ema", "rectified")
    assert run.manifest["losses"]["objective"] == {"forget": -1.0, "retain": WEIGHT}
    assert run.column("n_micro").tolist() == [2, 1, 2, 1]
    window = next(windows(forget=FORGET, retain=RETAIN))
    losses, logged = run.losses(), [log for log in trainer.state.log_history if "loss" in log]
    for name in ("forget", "retain"):
        risks = [reference.nll(start, batch[name]) for batch in window]
        gradient = flat_gradient(start, risks)
        mean = torch.stack(risks).mean().item()
        assert losses[name][0] == pytest.approx(mean)
        assert logged[0][f"{name}_nll"] == pytest.approx(mean)
        place = run.sources.index(name)
        assert run.gram()[0].sum(axis=0)[place, place] == pytest.approx(float(gradient @ gradient))
    assert logged[0]["loss"] == pytest.approx(losses["objective"][0])
    _, numbers = run.rectification()
    assert [log["rectify/fired"] for log in logged] == numbers["fired"][:, 0].tolist()


# Stopped and resumed.


RESUMED: dict[str, Callable[[nn.Module], Rectifier | None]] = {
    **RECTIFIERS,
    "select": lambda model: Rectifier(model, space="update", select=0.3),
    "bf16": lambda model: Rectifier(model, state=State(torch.bfloat16)),
    "sago": lambda model: Rectifier(model, SAGO(prefer_retain=True)),
}


@pytest.mark.parametrize(
    ("rectified", "stop"), [*[(name, 3) for name in RESUMED], ("gru", 1), ("gru", 2)]
)
def test_stopped_and_resumed_equals_not_stopped(rectified: str, stop: int, tmp_path: Path) -> None:
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": stop}

    def train(name: str, *callbacks: Any, resume: Any = None) -> list[Any]:
        model = tiny.llama(dropout=0.2)
        rectifier = RESUMED[rectified](model)
        trainer = trained(
            tmp_path / name,
            model,
            GradDiff(forget=NPO(beta=0.1)),
            rectifier=rectifier,
            recorder=partial(Recorder, path=tmp_path / f"{name}.h5"),
            callbacks=callbacks,
            resume=resume,
            **options,
        )
        state = rectifier.state_dict() if rectifier is not None else {}
        return [states(model), trainer.optimizer.state_dict()["state"], state]

    def leave(control: Any, **_: Any) -> None:
        control.should_training_stop = True

    whole = train("whole")
    train("parts", At("on_step_end", stop + 1, leave))  # a row more than the checkpoint has steps
    resumed = train("parts", resume=str(tmp_path / f"parts/out/checkpoint-{stop}"))
    assert same(whole, resumed)
    runs = [open_run(tmp_path / f"{name}.h5") for name in ("whole", "parts")]
    assert runs[0].steps.tolist() == runs[1].steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(runs[0].gram(), runs[1].gram())


def test_after_an_epoch_that_was_cut_short_comes_the_next(tmp_path: Path) -> None:
    met: list[tuple[int, int]] = []

    def noting(pairs: Any) -> Any:
        for pair in pairs:
            sides = zip((FORGET, RETAIN), (pair["forget"], pair["retain"]), strict=True)
            met.append(tuple(next(i for i, x in enumerate(s) if x is own) for s, own in sides))
        return collate(pairs)

    def cut(control: Any, **_: Any) -> None:
        control.should_epoch_stop = True

    data = {"forget": FORGET, "retain": RETAIN, "data_collator": noting}
    trained(tmp_path, tiny.gpt2(), NPO(), data=data, callbacks=[At("on_step_end", 1, cut)])
    pairing = Pairing((len(FORGET), len(RETAIN)), SEED)
    assert met[0] == next(iter(pairing))
    pairing.epoch = 1
    assert met[-len(FORGET) :] == list(pairing)


def test_a_recorder_that_goes_on_elsewhere_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    path, objective = tmp_path / "run.h5", GradientAscent()
    with Recorder(model := tiny.llama(), path) as recorder:
        trained(tmp_path, model, objective, recorder=recorder, **options)
    resume = str(tmp_path / "out/checkpoint-2")
    with (
        Recorder(model := tiny.llama(), path, resume=True) as recorder,
        pytest.raises(ValueError, match=r"go on with step 2, as the checkpoint does\. Found 4"),
    ):
        trained(tmp_path, model, objective, recorder=recorder, resume=resume)
    with Recorder(model := tiny.llama(), path, resume=True, next_step=2) as recorder:
        trained(tmp_path, model, objective, recorder=recorder, resume=resume)
    assert open_run(path).steps.tolist() == [0, 1, 2, 3]


def test_what_training_took_hold_of_is_let_go(tmp_path: Path) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("stop")

    model = tiny.llama()
    rectifier = Rectifier(model, space="update")
    path = tmp_path / "run.h5"
    options = {"rectifier": rectifier, "recorder": partial(Recorder, path=path)}
    with pytest.raises(KeyError, match="stop"):
        trained(
            tmp_path, model, GradientAscent(), callbacks=[At("on_step_end", 2, fail)], **options
        )
    run = open_run(path)
    assert run.state == "open"
    assert run.steps.tolist() == [0, 1]
    # Another optimizer, another training: the rectifier is free for it.
    options["recorder"] = partial(Recorder, path=path, overwrite=True)
    trained(tmp_path, model, GradientAscent(), **options)
    assert open_run(path).state == "complete"
    rectifier.attach(torch.optim.SGD(model.parameters()))
