"""The trainer for unlearning: against a plain loop, and watched, stopped and resumed."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.capture import every
from geffect.data.collate import collate
from geffect.data.pairs import Pairing
from geffect.objectives import (
    NPO,
    WTNPO,
    FrozenModel,
    GradDiff,
    GradientAscent,
    Objective,
    WeightedGradientAscent,
)
from geffect.projection import SAGO, State, nearest
from geffect.trainers import unlearning
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference, tiny
from tests.utils.trainers import At, same
from tests.utils.unlearning_runs import BATCH, EPOCHS, LR, SEED, WINDOW, arguments

Item = dict[str, Tensor]

WEIGHT = 0.01  # of the retain term: conflicts are left


def items(count: int, seed: int) -> list[Item]:
    """Samples of unequal length."""
    rows = [tiny.batch(seed + i, rows=1, length=5 + (3 * i) % 4) for i in range(count)]
    return [{name: value[0] for name, value in row.items()} for row in rows]


FORGET, RETAIN, WORLD = items(9, 0), items(14, 100), items(5, 200)
"""Two epochs of 5 micro-batches of a pair or two: windows of 3 and 2, and no retain item twice."""


def trained(
    folder: Path,
    model: nn.Module,
    objective: Objective,
    *,
    rectifier: Rectifier | None = None,
    recorder: Any = None,
    data: dict[str, Any] | None = None,
    resume: Any = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> UnlearningTrainer:
    """A trainer that has trained the model."""
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **options),
        objective=objective,
        **({"forget": FORGET, "retain": RETAIN} if data is None else data),
        rectifier=rectifier,
        recorder=recorder,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The same once more, naively.


def windows(**sets: Sequence[Item]) -> Iterator[list[dict[str, Item]]]:
    """The micro-batches of each step, padded by hand."""
    pairing = Pairing([len(of_set) for of_set in sets.values()], SEED)
    for pairing.epoch in range(EPOCHS):
        places = list(pairing)
        batches = []
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            columns = zip(sets.items(), zip(*chosen, strict=True), strict=True)
            batches.append({name: padded([s[i] for i in which]) for (name, s), which in columns})
        for start in range(0, len(batches), WINDOW):
            yield batches[start : start + WINDOW]


def padded(chosen: Sequence[Item]) -> Item:
    length = max(len(item["input_ids"]) for item in chosen)
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor(
            [[*item[name].tolist(), *[value] * (length - len(item[name]))] for item in chosen]
        )
        for name, value in fill.items()
    }


def ga(model: Any, origin: Any, batch: Any) -> Tensor:
    return -reference.nll(model, batch["forget"])


def wga(model: Any, origin: Any, batch: Any) -> Tensor:
    log_p = [p for row in reference.token_log_p(model, batch["forget"]) for p in row]
    return torch.stack([p.exp().detach() * p for p in log_p]).mean()


def npo(model: Any, origin: Any, batch: Any) -> Tensor:
    now, then = (reference.token_log_p(m, batch["forget"]) for m in (model, origin))
    losses = [
        -20 * torch.nn.functional.logsigmoid(0.1 * (sum(b).detach() - sum(a)))
        for a, b in zip(now, then, strict=True)
    ]
    return torch.stack(losses).mean()


def plus_retain(forget: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def objective(model: Any, origin: Any, batch: Any) -> Tensor:
        return forget(model, origin, batch) + WEIGHT * reference.nll(model, batch["retain"])

    return objective


OBJECTIVES = {
    "ga": (GradientAscent(), ga),
    "wga": (WeightedGradientAscent(), wga),
    "npo": (NPO(beta=0.1), npo),
    "graddiff": (GradDiff(weight=WEIGHT), plus_retain(ga)),
    "npo+gd": (GradDiff(forget=NPO(beta=0.1), weight=WEIGHT), plus_retain(npo)),
}


def flat_gradient(model: nn.Module, losses: list[Tensor]) -> Tensor:
    return reference.flat(reference.gradient(model, torch.stack(losses).mean()))


def naive(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    rule: Callable[[Tensor, Tensor], Tensor] | None = None,
    ema: float = 0.8,
) -> nn.Module:
    """A copy of the model after plain SGD, its gradient rectified against the average, clipped."""
    origin, model = copy.deepcopy(model), copy.deepcopy(model)
    average = None
    for window in windows(forget=FORGET, retain=RETAIN):
        u = flat_gradient(model, [loss_of(model, origin, batch) for batch in window])
        if rule is not None:
            r = flat_gradient(model, [reference.nll(model, batch["retain"]) for batch in window])
            average = r if average is None else ema * r + (1 - ema) * average
            u = rule(u, average)
        step = LR * u * min(1.0, 1.0 / (u.norm().item() + 1e-6))
        offset = 0
        with torch.no_grad():
            for parameter in model.parameters():
                size = parameter.numel()
                parameter -= step[offset : offset + size].view_as(parameter)
                offset += size
    return model


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("watched", [False, True])
def test_trains_like_a_plain_loop(name: str, watched: bool, tmp_path: Path) -> None:
    objective, loss_of = OBJECTIVES[name]
    model = tiny.gpt2()
    expected = naive(model, loss_of)
    recorder = partial(Recorder, path=tmp_path / "run.h5") if watched else None
    trained(tmp_path, model, objective, recorder=recorder)
    assert_close(model, expected, 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("watched", [False, True])
def test_rectifies_like_a_plain_loop(name: str, watched: bool, tmp_path: Path) -> None:
    objective, loss_of = OBJECTIVES[name]
    model = tiny.gpt2()
    expected, plain = naive(model, loss_of, reference.gru), naive(model, loss_of)
    assert not all(map(torch.equal, expected.parameters(), plain.parameters()))
    recorder = partial(Recorder, path=tmp_path / "run.h5") if watched else None
    trained(tmp_path, model, objective, rectifier=Rectifier(model), recorder=recorder)
    assert_close(model, expected, 1e-8)  # the average is kept in float32


def test_the_forget_part_alone_is_rectified(tmp_path: Path) -> None:
    def rule(u: Tensor, r: Tensor) -> Tensor:
        return reference.gru(u - WEIGHT * r, r) + WEIGHT * r

    model = tiny.gpt2()
    expected = naive(model, plus_retain(ga), rule, ema=1.0)
    rectifier = Rectifier(model, part="forget", ema=1.0)
    trained(tmp_path, model, GradDiff(weight=WEIGHT), rectifier=rectifier)
    assert_close(model, expected, 1e-8)


@pytest.mark.parametrize("watched", [False, True])
def test_of_an_objective_without_retain_term_all_is_forget_part(
    watched: bool, tmp_path: Path
) -> None:
    ends = []
    for part in ("total", "forget"):
        model = tiny.gpt2()
        recorder = partial(Recorder, path=tmp_path / f"{part}.h5") if watched else None
        rectifier = Rectifier(model, part=part)
        objective = NPO(beta=0.5)  # its weight is -4, which rounds nothing
        trainer = trained(tmp_path, model, objective, rectifier=rectifier, recorder=recorder)
        ends.append(states(model))
    assert same(*ends)
    assert any(log.get("rectify/fired") for log in trainer.state.log_history)


def test_the_applied_update_harms_nothing(tmp_path: Path) -> None:
    """Under AdamW, whose steps break what the gradient satisfies."""
    logged = {}
    for space in ("gradient", "update"):
        model = tiny.llama()
        rectifier = Rectifier(model, space=space, measure_update=True)
        options = {"optim": "adamw_torch", "num_train_epochs": 6}
        history = trained(
            tmp_path, model, GradientAscent(), rectifier=rectifier, **options
        ).state.log_history
        logged[space] = [log["rectify/applied_average"] for log in history if "loss" in log]
    assert min(logged["gradient"]) < -1e-5
    assert min(logged["update"]) > -1e-8


def test_several_retain_sets(tmp_path: Path) -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, nearest, protect=("retain", "world"), ema=1.0)
    data = {"forget": FORGET, "retain": {"retain": RETAIN, "world": WORLD}}
    trainer = trained(tmp_path, model, NPO(), rectifier=rectifier, data=data)
    steps = [log for log in trainer.state.log_history if "loss" in log]
    for log in steps:
        assert min(log["rectify/cosine_after_retain"], log["rectify/cosine_after_world"]) > -1e-5
        assert log["world_nll"] > 0
    assert any(log["rectify/cosine_before_world"] < 0 for log in steps)


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
        options = {"optim": "adamw_torch", "gradient_accumulation_steps": 4}  # and then 1
        rectifier = RECTIFIERS[rectified](model)
        trainer = trained(
            tmp_path, model, objective, rectifier=rectifier, recorder=recorder, **options
        )
        ends.append([states(model), trainer.optimizer.state_dict()["state"]])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_only_steps_that_are_due_cost_their_risks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama()
    forward, seen = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(1) or forward(*a, **k))
    recorder = partial(Recorder, path=tmp_path / "run.h5", when=every(2))
    trainer = trained(tmp_path, model, GradientAscent(), recorder=recorder)
    # Windows of 3 and 2: on the recorded ones a forward more, over retain data.
    assert len(seen) == 2 * (2 * 3 + 2)
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
    assert run.sources == ("objective", "forget", "retain", "retain_ema")
    assert run.manifest["losses"]["objective"] == {"forget": -1.0, "retain": WEIGHT}
    assert run.column("n_micro").tolist() == [3, 2, 3, 2]
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


# All steps, all kinds of models.


class Logits(nn.Embedding):
    """The least of a language model: the logits of the next token, by the one before it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(tiny.VOCABULARY, tiny.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids))


def test_every_step_of_partial_windows_is_rectified(tmp_path: Path) -> None:
    """50 micro-batches, 8 a step, 5 epochs: 7 steps an epoch."""
    model = Logits().double()
    data = {"forget": items(50, 0), "retain": items(50, 50)}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    path = tmp_path / "run.h5"
    rectifier = Rectifier(model, ema=1.0)
    trainer = trained(
        tmp_path,
        model,
        NPO(),
        rectifier=rectifier,
        recorder=partial(Recorder, path=path, update=True),
        data=data,
        num_train_epochs=5,
        **options,
    )
    run = open_run(path)
    assert run.column("n_micro").tolist() == [*[8] * 6, 2] * 5
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 35
    assert rectifier.skipped == 0
    K = run.gram().sum(axis=1)
    update, retain = run.sources.index("update"), run.sources.index("retain_ema")
    assert (K[:, update, update] > 0).all()  # none is empty
    for log, k in zip(logged, K, strict=True):
        # Of what SGD did, which is minus the rectified gradient, nothing harms.
        assert k[update, retain] <= 1e-6 * math.sqrt(k[update, update] * k[retain, retain])
        assert log["rectify/cosine_after"] >= -1e-6
    assert any(log["rectify/fired"] for log in logged)


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    frozen = tiny.llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(frozen), config)
    path = tmp_path / "run.h5"
    trainer = trained(
        tmp_path,
        model,
        NPO(),
        rectifier=Rectifier(model, space="update"),
        recorder=partial(Recorder, path=path),
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=2,
    )
    assert trainer.state.global_step == 4
    assert len(open_run(path).layers) == 2 * 2 * 4
    base = {n.replace("base_layer.", ""): t for n, t in model.get_base_model().named_parameters()}
    for name, tensor in frozen.named_parameters():
        assert torch.equal(tensor, base[name])
    again = peft.get_peft_model(copy.deepcopy(frozen), config)
    trained(
        tmp_path,
        again,
        NPO(),
        rectifier=Rectifier(again, space="update"),
        optim="adamw_torch",
        resume=str(tmp_path / "out/checkpoint-2"),
    )
    assert same(states(model), states(again))


def test_checkpointed_activations(tmp_path: Path) -> None:
    ends = []
    for checkpointed in (False, True):
        model = tiny.llama(dropout=0.2)
        trained(
            tmp_path,
            model,
            GradDiff(),
            rectifier=Rectifier(model),
            gradient_checkpointing=checkpointed,
        )
        ends.append(states(model))
    assert same(*ends)


# The model before unlearning.


@pytest.mark.parametrize("objective", [GradientAscent(), GradDiff(), WeightedGradientAscent()])
def test_no_reference_is_made_where_none_is_used(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearning, "FrozenModel", None)
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective=objective, forget=FORGET, retain=RETAIN
    )
    assert trainer.objective is objective and trainer.reference is None


@pytest.mark.parametrize("objective", [NPO(), WTNPO(), GradDiff(forget=NPO())])
def test_the_reference_is_the_model_before_unlearning(objective: Objective, tmp_path: Path) -> None:
    model = tiny.llama(dropout=0.2)
    before = states(model)
    trainer = trained(tmp_path, model, objective)
    kept = trainer.reference.model
    assert same(states(kept), before)
    assert not same(states(model), before)
    assert not kept.training
    assert not any(p.requires_grad for p in kept.parameters())
    assert trainer.objective is objective


def test_a_reference_that_is_given_is_used(tmp_path: Path) -> None:
    given = FrozenModel(tiny.llama(seed=1).eval())
    options = {"forget": FORGET, "retain": RETAIN}
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective=NPO(), reference=given, **options
    )
    assert trainer.reference is given


def test_the_reference_runs_in_the_precision_of_the_model(tmp_path: Path) -> None:
    """Then the first loss of NPO is -(2 / beta) log sigmoid(0), in half precision too."""
    trainer = trained(tmp_path, tiny.llama(), NPO(beta=0.1), bf16=True, rectifier=None)
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert first == pytest.approx(20 * math.log(2), rel=1e-6)


# Evaluation.


@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_is_a_mean_over_all_tokens(size: int, tmp_path: Path) -> None:
    model = tiny.gpt2()
    trainer = UnlearningTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=size),
        objective=NPO(),
        forget=FORGET,
        retain=RETAIN,
        eval_dataset={"world": WORLD},
    )
    metrics = trainer.evaluate()
    for name, data in {"forget": FORGET, "retain": RETAIN, "world": WORLD}.items():
        expected = reference.nll(model, padded(data)).item()
        assert metrics[f"eval_{name}_nll"] == pytest.approx(expected, rel=1e-6)
    alone = trainer.evaluate(WORLD)
    assert alone["eval_nll"] == pytest.approx(metrics["eval_world_nll"])


def test_evaluation_in_training_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for evaluated in ("no", "steps"):
        model = tiny.llama()
        trainer = trained(
            tmp_path,
            model,
            NPO(),
            rectifier=Rectifier(model),
            eval_strategy=evaluated,
            eval_steps=1,
        )
        ends.append(states(model))
    assert same(*ends)
    retained = [log for log in trainer.state.log_history if "eval_retain_nll" in log]
    assert [log["step"] for log in retained] == [1, 2, 3, 4]


# Data.


def test_pairs_that_are_given(tmp_path: Path) -> None:
    """Nested items come as they are, past the Trainer's removal of columns; so do columns."""
    pairs = [{"forget": f, "retain": r} for f, r in zip(FORGET, RETAIN, strict=False)]
    model, objective = tiny.llama(), GradDiff()
    data = {"train_dataset": pairs, "forget": FORGET, "retain": RETAIN}
    trainer = trained(tmp_path, model, objective, rectifier=Rectifier(model), data=data)
    assert trainer.state.global_step == 4
    assert trainer.evaluate()["eval_retain_nll"] > 0


def test_the_model_sees_every_column(tmp_path: Path) -> None:
    model = tiny.llama()
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    pictures = torch.rand(len(FORGET), 3, 4, 4)
    forget = [
        {**item, "position_ids": torch.arange(len(item["labels"])) % 3, "pixel_values": picture}
        for item, picture in zip(FORGET, pictures, strict=True)
    ]
    trained(tmp_path, model, GradientAscent(), data={"forget": forget, "retain": RETAIN})
    pairing = Pairing((len(FORGET), len(RETAIN)), SEED)
    places = [forget for forget, _ in pairing][:BATCH]
    columns = {"input_ids", "attention_mask", "position_ids", "pixel_values"}
    assert all(call.keys() >= columns for call in seen)
    assert torch.equal(seen[0]["pixel_values"], pictures[places])
    for row, place in zip(seen[0]["position_ids"], places, strict=True):
        own = forget[place]["position_ids"]
        assert torch.equal(row[: len(own)], own) and not row[len(own) :].any()


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    make = partial(UnlearningTrainer, tiny.llama(), objective=NPO(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"should both be sets of items.*Found forget"):
        make(forget=FORGET)
    with pytest.raises(ValueError, match="Found forget, world"):
        make(forget=FORGET, retain={"world": WORLD})
    with pytest.raises(TypeError, match=r"`eval_dataset` should be .* Found `list`\. Pass"):
        make(forget=FORGET, retain=RETAIN, eval_dataset=WORLD)
