"""The callback beside a rectifier: the objective's own gradient, and what it became."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer

from geffect import Rectifier, open_run
from geffect.gram import cosine
from geffect.risk import nll
from geffect.trainers import GEffectCallback, UnlearningTrainer, rectify
from tests.utils import shallow as tiny
from tests.utils import trainers
from tests.utils.rectified_trainers import rectified
from tests.utils.trainers import Scaled, same, trainer
from tests.utils.unlearning_trainers import RETAIN, opposed_pairs

PROBES = {"forget": tiny.batch(0), "retain": RETAIN}


class GA(Trainer):
    """Ascent on the loss of the model."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return -model(**inputs).loss


class ScaledGA(Scaled, GA):
    """The same behind a GradScaler."""

    overflows = ()


class ByHand(Trainer):
    """A Trainer with a rectifier of its own, unknown to others."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "own"):
            self.own = Rectifier(model, ema=1.0)
        forget = nll(model, self._prepare_inputs(inputs))
        self.own.backward(
            objective={"forget": -1.0}, forget=forget, retain=nll(model, RETAIN[0]),
            accumulate=not self.accelerator.sync_gradients,
        )  # fmt: skip
        return -forget.detach()


def by_rectify(folder: Path, *callbacks: Any, options: Any = None, **told: Any) -> Any:
    training = trainer(folder, tiny.llama(), *callbacks, **{"kind": GA, **told})
    rectify(training, Rectifier(training.model, ema=1.0, **(options or {})), retain=RETAIN)
    return training


def by_hand(folder: Path, *callbacks: Any) -> Any:
    return trainer(folder, tiny.llama(), *callbacks, kind=ByHand)


def by_unlearning_trainer(folder: Path, *callbacks: Any) -> Any:
    model = tiny.llama()
    arguments = trainer(folder, model, logging_steps=100).args
    return UnlearningTrainer(
        model, arguments, objective={"forget": -1.0}, forget=trainers.samples(),
        retain=trainers.samples(seed=70), rectifier=Rectifier(model, ema=1.0),
        callbacks=list(callbacks),
    )  # fmt: skip


class Notes(trainers.TrainerCallback):
    """The gradient that each step hands to the optimizer, before it is clipped."""

    def __init__(self) -> None:
        self.clipped: list[np.ndarray] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        self.clipped.append(torch.cat(parts).numpy())


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("make", [by_rectify, by_hand, by_unlearning_trainer])
def test_both_are_recorded_and_training_ends_as_unwatched(
    make: Any, update: bool, tmp_path: Path
) -> None:
    notes = Notes()
    callback = GEffectCallback(tmp_path / "run.h5", probes=PROBES, update=update)
    training = make(tmp_path, callback, notes)
    training.train()
    plain = make(tmp_path)
    plain.train()
    assert same(training.model.state_dict(), plain.model.state_dict())
    assert same(training.optimizer.state_dict(), plain.optimizer.state_dict())
    run = open_run(tmp_path / "run.h5")
    own = ("retain_ema", "rectified", *(["update"] if update else []))
    assert run.sources == ("objective", "forget", "retain", *own)
    assert run.manifest["rectifier"]["rule"] == "gru"
    K = run.gram().sum(axis=1)
    x, r, u = (run.index(name) for name in ("rectified", "retain_ema", "objective"))
    _, did = run.rectification()
    np.testing.assert_allclose(K[:, u, r], did["inner_before"][:, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(K[:, u, u] ** 0.5, did["norm_before"][:, 0], rtol=1e-5)
    np.testing.assert_allclose(K[:, x, x] ** 0.5, did["norm_after"][:, 0], rtol=1e-4)
    factor = run.column("clip_scale")
    lengths = [np.linalg.norm(gradient) for gradient in notes.clipped]
    np.testing.assert_allclose(K[:, x, x] ** 0.5 * factor, lengths, rtol=1e-5)
    harmed = K[:, u, r] < 0
    assert harmed.any() == did["fired"].any()
    assert (np.abs(cosine(K, x, r))[harmed] < 1e-5).all()
    logged = [set(entry) for entry in training.state.log_history]
    assert any("geffect/rectified_unlearning_g_effect" in entry for entry in logged)
    assert any("geffect/cosine_rectified_retain" in entry for entry in logged)


def test_a_retain_term_that_is_cut_apart_is_in_the_objective(tmp_path: Path) -> None:
    told: dict[str, Any] = {"data": opposed_pairs(), "made": {"alpha": 0.4}}
    plain, seen = rectified(tmp_path, **told), rectified(tmp_path, **told)
    seen.add_callback(GEffectCallback(tmp_path / "run.h5", probes={"retain": RETAIN}))
    plain.train()
    seen.train()
    assert same(plain.model.state_dict(), seen.model.state_dict())
    run = open_run(tmp_path / "run.h5")
    K = run.gram().sum(axis=1)
    x, r, u = (run.index(name) for name in ("rectified", "retain_ema", "objective"))
    for step, report in enumerate(plain.reports.all):
        assert K[step, u, r] == pytest.approx(report.inner_before[0], rel=1e-5)
        assert K[step, x, x] ** 0.5 == pytest.approx(report.norm_after[0], rel=1e-5)
    assert any(plain.reports.fired)


def test_a_conflict_is_that_of_the_objective_itself(tmp_path: Path) -> None:
    callback = GEffectCallback(tmp_path / "run.h5", probes={"retain": tiny.batch(78, rows=2)})
    training = trainer(
        tmp_path, tiny.llama(), callback, kind=GA, data=[trainers.samples(1, seed=78)[0]],
        gradient_accumulation_steps=1, max_steps=2, optim="sgd",
    )  # fmt: skip
    rectify(training, Rectifier(training.model, ema=1.0), retain=tiny.batch(78, rows=2))
    training.train()
    run = open_run(tmp_path / "run.h5")
    K = run.gram().sum(axis=1)
    x, r, u = (run.index(name) for name in ("rectified", "retain", "objective"))
    assert (cosine(K, u, r) < -0.5).all()
    assert (np.abs(cosine(K, x, r)) < 1e-5).all()


def test_a_loss_scale_is_in_neither(tmp_path: Path) -> None:
    for name, kind in {"plain": GA, "scaled": ScaledGA}.items():
        callback = GEffectCallback(tmp_path / name, probes=PROBES)
        by_rectify(tmp_path, callback, kind=kind).train()
    plain, scaled = (open_run(tmp_path / name) for name in ("plain", "scaled"))
    assert plain.sources == scaled.sources
    for name in ("objective", "rectified"):
        lengths = [run.gram()[:, :, i, i].sum(axis=1) for run in (plain, scaled)
                   for i in [run.index(name)]]  # fmt: skip
        np.testing.assert_allclose(*lengths, rtol=0.02)  # in half precision


def test_in_update_space_the_update_shows_it(tmp_path: Path) -> None:
    callback = GEffectCallback(tmp_path / "run.h5", probes=PROBES)
    by_rectify(tmp_path, callback, options={"space": "update"}).train()
    run = open_run(tmp_path / "run.h5")
    assert run.sources == ("objective", "forget", "retain", "retain_ema", "update")
    K = run.gram().sum(axis=1)
    assert (cosine(K, run.index("update"), run.index("retain_ema")) < 1e-5).all()
    _, did = run.rectification()
    assert did["fired"].any()


def test_a_run_is_continued_with_its_rectifier(tmp_path: Path) -> None:
    told: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = by_rectify(tmp_path, GEffectCallback(tmp_path / "whole.h5", probes=PROBES), **told)
    whole.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    first = GEffectCallback(tmp_path / "cut.h5", probes=PROBES, when=lambda step: step < 3)
    by_rectify(tmp_path, first).train()
    rest = by_rectify(tmp_path, GEffectCallback(tmp_path / "cut.h5", probes=PROBES), **told)
    rest.train(resume_from_checkpoint=checkpoint)
    np.testing.assert_array_equal(
        open_run(tmp_path / "cut.h5").gram(), open_run(tmp_path / "whole.h5").gram()
    )
    other = by_rectify(
        tmp_path, GEffectCallback(tmp_path / "cut.h5", probes=PROBES),
        options={"scope": "layer"}, **told,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"The rectifier should be set up as"):
        other.train(resume_from_checkpoint=checkpoint)
    bare = trainer(
        tmp_path, tiny.llama(), GEffectCallback(tmp_path / "cut.h5", probes=PROBES), kind=GA, **told
    )
    with pytest.raises(ValueError, match="the rectifier should stay those of the run"):
        bare.train(resume_from_checkpoint=checkpoint)
