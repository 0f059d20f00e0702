"""Trainers that differentiate their objective at a relearned copy, beside loops."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, Relearned, distributed, open_run, relearned
from geffect.capture import every
from geffect.objectives import KL, NPO, GradDiff, Regularised, WeightedGradientAscent
from geffect.trainers import rectify
from geffect.trainers.callback import GEffectCallback
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference, two_ranks
from tests.utils import shallow as tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.rectified_trainers import gradient, gru, stepped
from tests.utils.rectified_trainers import windows as windows_of
from tests.utils.trainers import same, whole
from tests.utils.unlearning_runs import (
    FORGET,
    KINDS,
    RETAIN,
    WEIGHT,
    Item,
    alike_items,
    arguments,
    ends_of,
    flat_gradient,
    followed,
    states,
    wga,
)

AT = Relearned(radius=0.05, steps=2)
OBJECTIVES: dict[str, Any] = {
    "wga": WeightedGradientAscent(),
    "wga+gd": GradDiff(forget=WeightedGradientAscent(), weight=WEIGHT),
    "wga+kl": Regularised(WeightedGradientAscent(), KL(), weight=WEIGHT),
}


def trained(
    folder: Path, model: nn.Module, objective: Any, *, way: Any = AT, **options: Any
) -> UnlearningTrainer:
    named = {
        name: options.pop(name)
        for name in ("rectifier", "recorder", "callbacks")
        if name in options
    }
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **options),
        objective=objective,
        forget=FORGET,
        retain=RETAIN,
        relearned=way,
        **named,
    )
    trainer.train()
    return trainer


def naive(model: nn.Module, weight: float, rectified: bool) -> nn.Module:
    """A copy of the model after plain SGD: WGA at the copy, its retain term at theta."""

    def gradient_of(model: nn.Module, window: list[dict[str, Item]]) -> Tensor:
        at_copy = []
        for batch in window:
            learned = partial(reference.nll, model, batch["forget"])
            with relearned(model, learned, radius=AT.radius, steps=AT.steps):
                at_copy.append(flat_gradient(model, [wga(model, None, batch)]))
        r = flat_gradient(model, [reference.nll(model, batch["retain"]) for batch in window])
        return torch.stack(at_copy).mean(0) + weight * r

    return followed(model, gradient_of, gru if rectified else None)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", ["wga", "wga+gd"])
def test_trains_like_a_plain_loop(
    name: str, watched: bool, rectified: bool, tmp_path: Path
) -> None:
    model = tiny.gpt2()
    expected = naive(model, WEIGHT if name == "wga+gd" else 0.0, rectified)
    trainer = trained(
        tmp_path,
        model,
        OBJECTIVES[name],
        rectifier=Rectifier(model) if rectified else None,
        recorder=partial(Recorder, path=tmp_path / "run.h5") if watched else None,
    )
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 4
    if watched:
        run = open_run(tmp_path / "run.h5")
        assert run.manifest["losses"]["objective"] == "loss"
        assert run.manifest["relearned"]["relearns"] == "forget"
        assert run.manifest["objective"]["name"]


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_watched_training_is_the_same_to_the_last_bit(
    name: str, rectified: bool, tmp_path: Path
) -> None:
    ends = []
    recorded = partial(Recorder, path=tmp_path / "run.h5", overwrite=True)
    for recorder in (None, partial(recorded, when=every(3)), partial(recorded, update=True)):
        model = tiny.llama(dropout=0.2)
        trainer = trained(
            tmp_path,
            model,
            OBJECTIVES[name],
            recorder=recorder,
            rectifier=Rectifier(model, space="update") if rectified else None,
            optim="adamw_torch",
        )
        ends.append([states(model), trainer.optimizer.state_dict()["state"]])
        torch.manual_seed(0)
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("name", ["wga", "wga+gd"])
def test_without_a_radius_training_is_that_without_a_copy(name: str, tmp_path: Path) -> None:
    ends = []
    for way in (None, Relearned(radius=0.0)):
        model = tiny.llama(dropout=0.2)
        rectifier = Rectifier(model)
        trained(tmp_path, model, OBJECTIVES[name], way=way, rectifier=rectifier)
        ends.append(states(model))
    assert same(ends[0], ends[1])


def test_a_part_that_keeps_is_recorded_at_theta(tmp_path: Path) -> None:
    model = tiny.llama()
    recorder = partial(Recorder, path=tmp_path / "run.h5")
    trained(tmp_path, model, OBJECTIVES["wga+kl"], recorder=recorder)
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["relearned"]["stays"] == ["retain", "objective.kl"]
    assert {"objective.forget", "objective.kl"} <= {*run.sources}


def test_a_trainer_that_knew_nothing_of_it_does_what_a_loop_does(tmp_path: Path) -> None:
    data = kinds.opposed_pairs(kinds.WGA)
    told: dict[str, Any] = {"kind": kinds.WGA, "data": data, "made": {"alpha": 0.4}, **kinds.SGD}
    trainer = kinds.unlearner(tmp_path, **told)
    start = copy.deepcopy(trainer.model)
    path = tmp_path / "run.h5"
    with Recorder(trainer.model, path) as recorder:
        rectify(
            trainer,
            Rectifier(trainer.model),
            retain=kinds.RETAIN[:1],
            recorder=recorder,
            relearned=AT,
        )
        trainer.train()
    twin = kinds.unlearner(tmp_path, **told)
    twin.model.load_state_dict(start.state_dict())
    model, parameters, average = twin.model, [*twin.model.parameters()], None
    retain = kinds.RETAIN[0]
    for window in windows_of(trainer.data_collator.batches, epochs=2, each=2):
        u: Any = 0.0
        for batch in window:
            learned = partial(reference.nll, model, batch["forget"])
            with relearned(model, learned, radius=AT.radius, steps=AT.steps):
                u = u + gradient(twin.compute_loss(model, batch), parameters) / len(window)
        r = gradient(reference.nll(model, retain), parameters)
        average = r if average is None else 0.8 * r + 0.2 * average
        stepped(model, gru(u, average), rate=0.05, limit=0.1)
    assert kinds.apart(trainer.model, model) < 1e-8
    assert kinds.apart(trainer.model, start) > 1e-3
    assert open_run(path).manifest["relearned"]["radius"] == AT.radius


def test_a_callback_says_where_the_objective_was_taken(tmp_path: Path) -> None:
    model = tiny.llama()
    probes = {name: tiny.batch(seed) for seed, name in enumerate(("forget", "retain"))}
    callback = GEffectCallback(tmp_path / "run.h5", probes=probes)
    trained(tmp_path, model, OBJECTIVES["wga"], callbacks=[callback], max_steps=1)
    assert open_run(tmp_path / "run.h5").manifest["relearned"]["steps"] == AT.steps


def test_an_objective_without_a_bound_is_told(tmp_path: Path) -> None:
    for objective, says in ((NPO(), "Found NPO"), (GradDiff(), "Found ascent on `forget`")):
        with pytest.warns(UserWarning, match=says):
            trained(tmp_path, tiny.llama(), objective, max_steps=1)


def test_what_cannot_be_trained_at_a_copy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Found `float`"):
        trained(tmp_path, tiny.llama(), OBJECTIVES["wga"], way=0.1)
    trainer = kinds.unlearner(tmp_path, kind=kinds.WGA)
    with pytest.raises(ValueError, match="`retain` batches should be given with `relearned`"):
        rectify(trainer, Rectifier(trainer.model), relearned=AT)
    other = kinds.unlearner(tmp_path, kind=kinds.WGA)
    with pytest.raises(TypeError, match="`relearned` should be a"):
        rectify(other, Rectifier(other.model), retain=kinds.RETAIN, relearned=True)


RUNS = [(kind, rectified) for kind in KINDS for rectified in (False, True)]


def end(folder: Path, kind: Any, rectified: bool, **options: Any) -> list[np.ndarray]:
    """The parameters after training."""
    model: Any = tiny.llama()
    trainer = kind(
        model,
        arguments(folder, max_grad_norm=0.5, num_train_epochs=1, max_steps=2, **options),
        objective=OBJECTIVES["wga+gd"],
        rectifier=Rectifier(model, space="update") if rectified else None,
        recorder=partial(Recorder, path=folder / f"{rectified}.h5"),
        forget=alike_items(12, 0),
        retain=alike_items(14, 100),
        relearned=AT,
    )
    trainer.train()
    return [whole(p) for p in trainer.model.parameters()]


def of_two(folder: str) -> dict[Any, Any]:
    return ends_of(folder, RUNS, end)


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    alone = {
        rectified: end(tmp_path, UnlearningTrainer, rectified, per_device_train_batch_size=4)
        for rectified in (False, True)
    }
    for told in two_ranks.run(of_two, str(tmp_path)):
        for (_, rectified), found in told.items():
            for a, b in zip(found, alone[rectified], strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["adapters", "bf16", "checkpointed"])
def test_other_kinds_of_training(kind: str, tmp_path: Path) -> None:
    ends = []
    options = {"adapters": {}, "bf16": {"bf16": True}, "checkpointed": {}}[kind]
    if kind == "checkpointed":
        options = {"gradient_checkpointing": True}
    for recorder in (None, partial(Recorder, path=tmp_path / "run.h5", update=True)):
        model: Any = tiny.llama(dropout=0.2)
        if kind == "adapters":
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        before = states(model)
        trained(tmp_path, model, OBJECTIVES["wga+gd"], recorder=recorder, **options)
        ends.append(states(model))
        moved = [name for name, tensor in before.items() if not torch.equal(tensor, ends[-1][name])]
        assert moved
        assert all("lora" in name for name in moved) or kind != "adapters"
    assert same(*ends)


def test_an_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_in_engine", lambda parameter: True)
    with pytest.raises(ValueError, match="should be in no DeepSpeed engine"):
        trained(tmp_path, tiny.llama(), OBJECTIVES["wga"])
