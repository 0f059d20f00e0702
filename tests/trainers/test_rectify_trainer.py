"""Rectified Trainers against loops that are written out, and what may happen on the way."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import g_effect
from geffect.gradients import Rectification
from geffect.objectives import nll
from geffect.trainers import RectifyMixin, rectify
from geffect.trainers.rectification_log import RectificationLog
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.rectified_trainers import gradient, gru, rectified, stepped, windows
from tests.utils.trainers import At, Scaled, same
from tests.utils.unlearning_trainers import (
    RETAIN,
    SGD,
    GradAscent,
    GradDiff,
    apart,
    opposed_pairs,
    unlearner,
)  # fmt: skip

KINDS = [
    kinds.GradDiff, kinds.KL, kinds.NPO, kinds.SimNPO, kinds.DPO, kinds.RMU, kinds.WGA,
    kinds.SatImp, kinds.UNDIAL, kinds.PDU, kinds.Older, kinds.Twice,
]  # fmt: skip


def weight_of_retain(trainer: Any, forget: Tensor, retain: Tensor) -> float:
    """dL/dR, the only thing of a loss that is no sum that has to be known."""
    leaf = retain.detach().requires_grad_()
    (factor,) = torch.autograd.grad(trainer.combined(forget.detach(), leaf.clone()), leaf)
    return float(factor) + (0.5 if isinstance(trainer, kinds.Twice) else 0.0)


def trained_by_hand(
    trainer: Any, batches: Sequence[Any], *, part: str, rate: float = 0.05, limit: float = 0.1
) -> int:
    """Train the model of a trainer that is none but for its losses; returns how often it fired."""
    model, parameters = trainer.model, [*trainer.model.parameters()]
    average, fired = None, 0
    for window in windows(batches, epochs=2, each=2):
        forget_part, term, factors = 0.0, 0.0, 0.0
        for batch in window:
            loss = trainer.compute_loss(model, batch)
            retain = trainer.compute_retain_loss(model, batch["retain"])
            factor = weight_of_retain(
                trainer, trainer.forget_loss(model, batch["forget"])[0], retain
            ) / len(window)
            share = factor * gradient(retain, parameters)
            forget_part = forget_part + gradient(loss, parameters) / len(window) - share
            term, factors = term + share, factors + factor
        r = term / factors
        average = r if average is None else 0.8 * r + 0.2 * average
        u = forget_part + term if part == "total" else forget_part
        fired += bool(u @ average < 0)
        x = gru(u, average)
        stepped(model, x if part == "total" else x + term, rate=rate, limit=limit)
    return fired


@pytest.mark.parametrize("part", ["total", "forget"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rectified_trainer_does_what_a_loop_does(kind: Any, part: Any, tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "kind": kind, "data": opposed_pairs(kind), "made": {"alpha": 0.4}, **SGD
    }  # fmt: skip
    trainer = rectified(tmp_path, rectifier={"part": part}, **told)
    hand = unlearner(tmp_path, **told)
    trainer.train()
    fired = trained_by_hand(hand, trainer.data_collator.batches, part=part)
    assert sum(trainer.reports.fired) == fired
    assert apart(trainer, hand) < 1e-8  # averages are in float32
    assert apart(trainer, tiny.gpt2()) > 1e-3


@pytest.mark.parametrize(
    "kind",
    [
        kinds.GradDiff, kinds.SimNPO, kinds.DPO, kinds.SatImp, kinds.UNDIAL, kinds.PDU,
        kinds.Older,
    ],
)  # fmt: skip
def test_the_cut_alone_changes_nothing(kind: Any, tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "kind": kind, "max_steps": 3, "gradient_accumulation_steps": 2, "made": {"alpha": 0.4}
    }  # fmt: skip
    plain = unlearner(tmp_path, **told)
    plain.train()
    trainer = rectified(tmp_path, rectifier={"rule": None}, **told)
    trainer.train()
    assert apart(trainer, plain) < 4e-9
    assert apart(trainer, tiny.gpt2()) > 1e-3
    loss, other = (t.state.log_history[0] for t in (trainer, plain))
    assert loss["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert loss["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


def test_every_step_of_every_epoch_is_rectified(tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "data": kinds.pairs(18), "gradient_accumulation_steps": 8, "num_train_epochs": 3, **SGD
    }  # fmt: skip
    model = tiny.llama()
    model.model.layers = model.model.layers[:1]
    trainer = rectified(tmp_path, model=model, rectifier={"ema": 1.0}, **told)
    moves: list[float] = []
    before = copy.deepcopy(trainer.model)

    class Moves(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            moves.append(apart(trainer, before))
            before.load_state_dict(trainer.model.state_dict())

    trainer.add_callback(Moves())
    trainer.train()
    assert trainer.state.global_step == len(trainer.reports.all) == 9
    assert trainer.reports.rectifier.skipped == 0
    assert len(moves) == 9
    assert min(moves) > 0


def test_a_retain_loss_without_weight_still_says_what_should_stay(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), **SGD}
    trainer = rectified(tmp_path, made={"alpha": 0.0}, **told)
    trainer.train()
    hand, model = unlearner(tmp_path, **told), tiny.gpt2()
    average, fired = None, 0
    parameters = [*model.parameters()]
    for window in windows(trainer.data_collator.batches, epochs=2, each=2):
        u = sum(gradient(hand.forget_loss(model, b["forget"])[0], parameters) for b in window)
        r = sum(gradient(hand.compute_retain_loss(model, b["retain"]), parameters) for b in window)
        u, r = u / len(window), r / len(window)
        average = r if average is None else 0.8 * r + 0.2 * average
        fired += bool(u @ average < 0)
        stepped(model, gru(u, average), rate=0.05, limit=0.1)
        report = trainer.reports.all.pop(0)
        assert report.retain_norm == pytest.approx([float(average.norm())], rel=1e-5)
    assert fired > 0
    assert apart(trainer, model) < 1e-8


class Seen(TrainerCallback):
    """The gradient that the optimizer is about to see, step by step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))


def test_what_is_clipped_is_the_rectified_gradient(tmp_path: Path) -> None:
    trainer = rectified(tmp_path, data=opposed_pairs(), made={"alpha": 0.4}, **SGD,
                        logging_steps=1)  # fmt: skip
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    for report, norm, logged in zip(
        trainer.reports.all, seen.norms, trainer.state.log_history, strict=False
    ):
        assert report.fired == (1.0,)
        assert report.norm_after[0] < 0.9 * report.norm_before[0]
        assert logged["grad_norm"] == pytest.approx(report.norm_after[0], rel=1e-6)
        assert norm == pytest.approx(0.1, rel=1e-4)


def test_the_log_has_means_of_what_was_done_since_the_last(tmp_path: Path) -> None:
    options = {"measure_update": True, "scope": "layer", "part": "forget"}
    data = opposed_pairs()
    trainer = rectified(tmp_path, rectifier=options, data=data, made={"eval_dataset": data},
                        eval_strategy="steps", eval_steps=2, label_names=["retain"])  # fmt: skip
    trainer.train()
    steps = trainer.reports.all
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry, of_two in zip(logs, (steps[:2], steps[2:]), strict=True):
        cosines, energy, applied = [], [], []
        for report in of_two:
            u, x, r = (math.hypot(*v) for v in
                       (report.norm_before, report.norm_after, report.retain_norm))  # fmt: skip
            cosines.append([sum(report.inner_before) / (u * r), sum(report.inner_after) / (x * r)])
            energy.append(1 - (x / u) ** 2)
            applied.append([sum(report.applied_average), sum(report.applied_fresh)])
        said = {name.removeprefix("rectify/"): value for name, value in entry.items()}
        before, after = (sum(pair) / 2 for pair in zip(*cosines, strict=True))
        assert said["cosine_before"] == pytest.approx(before)
        assert said["cosine_after"] == pytest.approx(after)
        assert said["removed"] == pytest.approx(sum(energy) / 2)
        average, fresh = (sum(pair) / 2 for pair in zip(*applied, strict=True))
        assert said["applied_average"] == pytest.approx(average)
        assert said["applied_fresh"] == pytest.approx(fresh)
        fired = [sum(report.fired) / len(report.blocks) for report in of_two]
        assert said["fired"] == pytest.approx(sum(fired) / 2)
        assert 0 < said["fired"] <= 1
        assert {"coefficient", "retain_norm"} <= said.keys()
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 3  # two evaluations, in which nothing is cut, and the end
    assert not [name for entry in others for name in entry if name.startswith("rectify/")]


def test_several_retain_sets_are_logged_by_their_names() -> None:
    nan, log = (math.nan,) * 2, RectificationLog()
    report = Rectification(
        ("model, retain", "model, world"), (1.0, 1.0), (0.0, 0.5), (1.0, -2.0), (1.0, 0.0),
        (2.0, 2.0), (1.0, 1.0), (1.0, 4.0), nan, nan, (0.0, 1.0),
        (8.0, 8.0), (4.0, 4.0), (3.0, 3.0), (6.0, 6.0),
    )  # fmt: skip
    log.take(report)
    log.take(report)
    log.take(None)
    means = log.means()
    assert means["rectify/cosine_before_retain"] == 0.5
    assert means["rectify/cosine_before_world"] == -0.25
    assert means["rectify/removed_world"] == 0.75
    assert (means["rectify/unmet_retain"], means["rectify/unmet_world"]) == (0.0, 1.0)
    assert (means["rectify/selected_world"], means["rectify/overlap_world"]) == (0.5, 0.5)
    assert not any("applied" in name for name in means)


# Precision, and how the graph is made.


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the state back that all accelerators of a process share."""
    yield
    AcceleratorState._reset_state()


class ScaledGradDiff(GradDiff, Scaled):
    """In float16, as far as the loss scale goes: at step 1 it overflows."""


class ScaledGradAscent(GradAscent, Scaled):
    """The same without a retain term."""


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("part", ["total", "forget"])
@pytest.mark.parametrize("retain", [False, True])
def test_a_step_that_overflows_is_as_if_it_had_not_been(
    part: Any, retain: bool, tmp_path: Path
) -> None:
    kind: Any = ScaledGradAscent if retain else ScaledGradDiff
    told: dict[str, Any] = {"rectifier": {"part": part, "measure_update": True}}
    told |= {"data": opposed_pairs(), **SGD, "retain": RETAIN if retain else None}
    scaled = rectified(tmp_path, kind=kind, **told)
    states = []

    class States(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            states.append(copy.deepcopy(scaled.reports.rectifier.state_dict()))

    scaled.add_callback(States())
    scaled.train()
    assert scaled.accelerator.scaler.get_scale() == 512.0
    reports = scaled.reports.all
    assert [report is None for report in reports] == [False, True, False, False]
    assert same(states[0]["memory"], states[1]["memory"])
    assert not same(states[1]["memory"], states[2]["memory"])
    assert scaled.reports.rectifier.skipped == 0
    AcceleratorState._reset_state()
    # In the units of a training without a scaler, whose first step is the same.
    plain = rectified(tmp_path, kind=GradAscent if retain else GradDiff, **told)
    plain.train()
    for name in ("inner_before", "norm_before", "retain_norm", "applied_fresh"):
        one, other = (getattr(t.reports.all[0], name) for t in (scaled, plain))
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.usefixtures("precision")
def test_a_loss_scale_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "overflows", ())
    told: dict[str, Any] = {"data": opposed_pairs(), "made": {"alpha": 0.4}, **SGD}
    scaled = rectified(tmp_path, kind=ScaledGradDiff, **told)
    scaled.train()
    AcceleratorState._reset_state()
    plain = rectified(tmp_path, **told)
    plain.train()
    assert any(plain.reports.fired)
    assert apart(scaled, plain) < 1e-8


@pytest.mark.usefixtures("precision")
def test_bfloat16_runs_with_the_casts_that_both_losses_share(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), "bf16": True}
    plain = unlearner(tmp_path, tiny.llama(), **told)
    plain.train()
    trainer = rectified(tmp_path, model=tiny.llama(), rectifier={"rule": None}, **told)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert apart(trainer, plain) < 1e-3  # two sums in bfloat16, in another order
    assert apart(trainer, tiny.llama()) > 5e-3


def test_gradients_that_are_checkpointed_are_the_same(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), "made": {"alpha": 0.4}, **SGD}
    plain = rectified(tmp_path, model=tiny.llama(), **told)
    plain.train()
    for reentrant in (False, True):
        checkpointed = rectified(
            tmp_path, model=tiny.llama(), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **told,
        )  # fmt: skip
        checkpointed.train()
        assert checkpointed.model.is_gradient_checkpointing
        assert any(checkpointed.reports.fired)
        assert apart(checkpointed, plain) < 1e-6


@pytest.mark.usefixtures("precision")
def test_a_compiled_model_is_rectified_alike(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), "made": {"alpha": 0.4}, **SGD}
    plain = rectified(tmp_path, model=tiny.llama(), **told)
    plain.train()
    compiled = rectified(
        tmp_path, model=tiny.llama(), torch_compile=True, torch_compile_backend="eager", **told
    )
    compiled.train()
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert any(compiled.reports.fired)
    assert apart(compiled, plain) < 1e-6


# Spaces, records, classes.


def test_in_update_space_what_is_applied_harms_nothing(tmp_path: Path) -> None:
    def violations(**options: Any) -> int:
        trainer = rectified(
            tmp_path, rectifier={"measure_update": True, **options}, data=opposed_pairs(),
            made={"alpha": 0.4},
        )  # fmt: skip
        trainer.train()
        assert any(trainer.reports.fired)
        return sum(
            report.applied_average[0] < -1e-6 * report.norm_after[0] * report.retain_norm[0]
            for report in trainer.reports.all
        )

    assert violations(space="gradient") > 0
    assert violations(space="update") == 0
    assert violations(space="update", scope="coordinate") == 0


@pytest.mark.parametrize("retain", [False, True])
def test_a_rectified_training_is_recorded_as_it_is(retain: bool, tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "kind": GradAscent if retain else GradDiff, "data": opposed_pairs(), **SGD
    }  # fmt: skip
    plain = rectified(tmp_path, retain=RETAIN if retain else None, **told)
    plain.train()
    trainer = unlearner(tmp_path, **told)
    with Recorder(trainer.model, tmp_path / "run.h5", update=True) as recorder:
        rectify(
            trainer, Rectifier(trainer.model), retain=RETAIN if retain else None, recorder=recorder
        )
        trainer.train()
    assert apart(plain, trainer) < 1e-12
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.column("n_micro").tolist() == [2, 1, 2, 1]
    assert set(run.sources) == {"objective", "retain", "retain_ema", "rectified", "update"}
    K = run.gram().sum(axis=1)
    u, r = run.index("objective"), run.index("retain_ema")
    for step, report in enumerate(plain.reports.all):
        assert K[step, u, r] == pytest.approx(report.inner_before[0], rel=1e-5)
    loss = trainer.state.log_history[0]["loss"]
    assert run.losses()["objective"][:2].mean() == pytest.approx(loss, rel=1e-5)


def test_probes_are_recorded_beside_what_is_rectified_and_change_nothing(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), **SGD}
    plain = rectified(tmp_path, **told)
    plain.train()
    trainer = unlearner(tmp_path, **told)
    start = copy.deepcopy(trainer.model)
    with Recorder(trainer.model, tmp_path / "run.h5") as recorder:
        rectify(trainer, Rectifier(trainer.model), recorder=recorder, probes={"forget": RETAIN[:1]})
        trainer.train()
    assert same(plain.model.state_dict(), trainer.model.state_dict())
    run = open_run(tmp_path / "run.h5")
    exact = reference.gradient(start, nll(start, RETAIN[0]))
    f = run.index("forget")
    assert run.gram()[0, :, f, f].sum() == pytest.approx(reference.inner(exact, exact), rel=1e-5)
    whose = {"unlearning", "retaining"}
    assert set(g_effect(run, by="model")["effect"]) == whose | {f"{w}, rectified" for w in whose}


def test_probes_need_a_recorder_and_names_of_their_own(tmp_path: Path) -> None:
    trainer = unlearner(tmp_path, data=opposed_pairs())
    with pytest.raises(ValueError, match=r"`recorder` should be given with `probes`.* Found none"):
        rectify(trainer, Rectifier(trainer.model), probes={"forget": RETAIN})
    with pytest.raises(ValueError, match=r"`probes` should have names of their own.*retain"):
        rectify(trainer, Rectifier(trainer.model), probes={"retain": RETAIN})
    rectify(trainer, Rectifier(trainer.model)).detach()  # what was refused left nothing behind


class RectifiedNPO(RectifyMixin, kinds.NPO):
    """A class of one's own."""


def test_a_class_of_ones_own_is_rectified_like_a_trainer(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(kinds.NPO)}
    one = rectified(tmp_path, kind=kinds.NPO, **told)
    one.train()
    model = tiny.gpt2()
    other = unlearner(
        tmp_path, model, kind=RectifiedNPO, made={"rectifier": Rectifier(model)}, **told
    )
    other.train()
    assert same(one.model.state_dict(), other.model.state_dict())


def test_detached_a_trainer_is_what_it_was(tmp_path: Path) -> None:
    plain = unlearner(tmp_path)
    plain.train()
    trainer = unlearner(tmp_path)
    before, callbacks = dict(vars(trainer)), [*trainer.callback_handler.callbacks]
    rectifier = Rectifier(trainer.model, space="update")
    attached = rectify(trainer, rectifier)
    assert type(trainer) is not GradDiff
    assert isinstance(trainer, GradDiff)
    attached.detach()
    attached.detach()
    assert type(trainer) is GradDiff
    assert vars(trainer).keys() == before.keys()
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert rectifier.report is None
    assert same(plain.model.state_dict(), trainer.model.state_dict())
    again = rectify(trainer, rectifier)  # it may be rectified again, by one who is asked now
    attached.detach()
    assert type(trainer) is not GradDiff
    again.detach()
    assert type(trainer) is GradDiff


def test_detached_in_the_midst_of_a_step_it_ends_as_it_would_have(tmp_path: Path) -> None:
    plain = unlearner(tmp_path)
    plain.train()
    trainer = unlearner(tmp_path)
    attached = rectify(trainer, Rectifier(trainer.model, rule=None))
    trainer.add_callback(At("on_substep_end", 1, lambda **_: attached.detach()))
    trainer.train()
    assert type(trainer) is GradDiff
    assert apart(plain, trainer) < 4e-9


def test_detached_from_its_optimizer_too(tmp_path: Path) -> None:
    trainer = unlearner(tmp_path, None, max_steps=1)
    attached = rectify(trainer, Rectifier(trainer.model, space="update"))
    trainer.train()
    attached.detach()
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_retain_gradient_of_zero_is_counted_and_rectifies_nothing(tmp_path: Path) -> None:
    class Zero(GradDiff):
        def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Tensor:
            return 0 * super().compute_retain_loss(model, retain_inputs)

    plain = unlearner(tmp_path, kind=Zero)
    plain.train()
    trainer = rectified(tmp_path, kind=Zero)
    with pytest.warns(UserWarning, match="retain gradient is zero"):
        trainer.train()
    assert trainer.reports.rectifier.skipped == 6
    assert apart(plain, trainer) < 4e-9


def test_adapters_are_rectified_and_nothing_else_moves(tmp_path: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(5)
        options = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny.llama(), options)

    told: dict[str, Any] = {"data": opposed_pairs(), "made": {"alpha": 0.4}}
    plain = unlearner(tmp_path, adapted(), **told)
    plain.train()
    same_steps = rectified(tmp_path, model=adapted(), rectifier={"rule": None}, **told)
    same_steps.train()
    assert apart(plain, same_steps) < 1e-6
    trainer = rectified(tmp_path, model=adapted(), rectifier={"scope": "parameter"}, **told)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(".lora_" in block for block in trainer.reports.rectifier.blocks)
    assert any(trainer.reports.fired)
    moved = {name for name, p in trainer.model.named_parameters() if (p != before[name]).any()}
    assert moved == {name for name in before if "lora_" in name}
