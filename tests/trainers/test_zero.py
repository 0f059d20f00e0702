"""The callback and `rectify` under DeepSpeed: two processes, against DDP and against themselves."""

import math
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer

from geffect import Recorder, Rectifier, open_run
from geffect.trainers import GEffectCallback, rectify
from tests.utils import tiny, trainers, two_ranks
from tests.utils.engines import loaded, whole_parameters
from tests.utils.trainers import At, stop
from tests.utils.unlearning_trainers import (
    RETAIN,
    GradAscent,
    GradDiff,
    opposed_pairs,
    unlearner,
)

if find_spec("deepspeed") is None:  # nothing but an engine needs to load it
    pytest.skip("needs deepspeed", allow_module_level=True)

PROBES = {"forget": tiny.batch(50, rows=1), "retain": [tiny.batch(s) for s in (51, 52)]}

STAGES: dict[str, dict[str, Any] | None] = {
    "ddp": None,  # comes first: an engine is said to all that follow
    "stage 1": {"stage": 1},
    "stage 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
}

OTHERS = {
    "stage 3, parameters": {"stage": 3, "offload_param": {"device": "cpu"}},
    "stage 0": {"stage": 0},
}

WATCHED: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "window": {"optim": "sgd", "gradient_accumulation_steps": 3, "learning_rate": 0.1},
}
"""Arguments of trainings; the second has windows of 3 micro-batches and of 1."""

RECTIFIED: dict[str, dict[str, Any]] = {
    "update": {"space": "update"},
    "apart": {"part": "forget", "scope": "layer"},
    "batches": {"scope": "coordinate"},
}
"""The options of a rectifier; the last has its retain gradient from batches."""


RESUMED = ["stage 2, offload", "stage 3"]

STEPS = {"gradient_accumulation_steps": 1}


def told(stage: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a trainer at a stage."""
    AcceleratorState._reset_state(reset_partial_state=True)
    zero = {**STAGES, **OTHERS}[stage]
    if zero is not None:
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return {"num_train_epochs": 1, "gradient_accumulation_steps": 1, **options}


def small() -> Any:
    model: Any = tiny.llama()
    model.model.layers = model.model.layers[:1]
    return model


class Overflowing(Trainer):
    """The loss of its second step is infinite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (
            math.inf if self.state.global_step == 1 else 1
        )


def watched(stage: str, case: str, folder: Path, *callbacks: Any, **options: Any) -> Any:
    resume, kind = options.pop("resume", None), options.pop("kind", Trainer)
    trainer = trainers.trainer(
        folder, small(), *callbacks, data=trainers.samples(8), kind=kind,
        **told(stage, folder, **WATCHED[case] | options),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rectified(stage: str, case: str, folder: Path, *callbacks: Any, **options: Any) -> Any:
    resume = options.pop("resume", None)
    ascent = case == "batches"
    trainer = unlearner(
        folder, small(), *callbacks, kind=GradAscent if ascent else GradDiff,
        data=opposed_pairs(count=8), made={} if ascent else {"alpha": 0.4},
        **told(
            stage, folder, optim="adamw_torch", **{"gradient_accumulation_steps": 3} | options
        ),
    )  # fmt: skip
    rectify(
        trainer,
        Rectifier(trainer.model, **RECTIFIED[case]),
        retain=RETAIN if ascent else None,
        recorder=partial(Recorder, path=folder / "run.h5"),
        probes={"forget": tiny.batch(50, rows=1)},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def begin() -> None:
    """Tell this process its place, and have DeepSpeed there."""
    two_ranks.tell_place()
    loaded()


def end(trainer: Any) -> list[torch.Tensor]:
    """The parameters that a training came to."""
    assert trainer.is_deepspeed_enabled == bool(trainer.args.deepspeed)
    return whole_parameters(trainer.model_wrapped)


def at_stages(folder: Path, cases: list[str]) -> Any:
    """What trainings come to at each stage."""
    begin()
    said: dict[Any, Any] = {}
    for stage in STAGES:
        for case in cases:
            own = folder / f"{stage} {case}"
            own.mkdir(exist_ok=True)
            if case in RECTIFIED:
                said[stage, case] = end(rectified(stage, case, own))
                continue
            callback = GEffectCallback(own / "run.h5", probes=PROBES)
            said[stage, case] = end(watched(stage, case, own, callback))
            if STAGES[stage]:
                said[stage, case, "alone"] = end(watched(stage, case, own))
    return said


def resumed_or_refused(folder: Path) -> Any:
    """What trainings come to that were stopped, and that were not; and what is refused."""
    begin()
    said: dict[str, Any] = {}
    for stage in RESUMED:
        own, saving = folder / stage, {"save_strategy": "steps", "save_steps": 2, **STEPS}
        through = partial(rectified, stage, "apart")
        through(own, beside(own), At("on_step_end", 2, stop), **saving)
        resume = str(own / "out" / "checkpoint-2")
        resumed = end(through(own, beside(own), resume=resume, **saving))
        own = own / "straight"
        said[stage] = resumed, end(through(own, beside(own), **STEPS))
    overflows = GEffectCallback(folder / "overflow.h5", probes=PROBES)
    watched("stage 3", "adamw", folder, overflows, kind=Overflowing)
    return said | refusals(folder)


def beside(folder: Path) -> GEffectCallback:
    return GEffectCallback(folder / "beside.h5", probes=PROBES)


def refusals(folder: Path) -> dict[str, str]:
    said = {}

    def refuse(name: str, act: Any) -> None:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    for name, stage in {"none": "stage 0", "parameters": "stage 3, parameters"}.items():
        callback = GEffectCallback(folder / f"{name}.h5", probes=PROBES)
        refuse(name, partial(watched, stage, "adamw", folder, callback))
    trainer = unlearner(
        folder, small(), data=opposed_pairs(count=8), **told("stage 3", folder, max_steps=2)
    )
    with Recorder(trainer.model, folder / "early.h5") as recorder:
        early = rectify(trainer, Rectifier(trainer.model), recorder=recorder)
        refuse("early", trainer.train)
    early.detach()
    trainer = unlearner(
        folder, small(), data=opposed_pairs(count=8),
        **told("stage 2, offload", folder, gradient_accumulation_steps=3),
    )  # fmt: skip
    within = rectify(trainer, Rectifier(trainer.model))
    trainer.add_callback(At("on_substep_end", 0, lambda **_: within.detach()))
    refuse("within", trainer.train)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes write."""
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[Any, Any]:
    """What the first of two processes has said of the stages."""
    of_cases = [two_ranks.run(at_stages, folder, [*cases]) for cases in (WATCHED, RECTIFIED)]
    return {key: ends for first, _ in of_cases for key, ends in first.items()}


@pytest.fixture(scope="module")
def more(folder: Path) -> dict[str, Any]:
    """And of trainings that were resumed or refused."""
    return two_ranks.run(resumed_or_refused, folder)[0]


ZERO = [stage for stage in STAGES if stage != "ddp"]


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("case", WATCHED)
def test_a_watched_training_ends_as_it_would_have_ended(stage: str, case: str, said: Any) -> None:
    assert all(map(torch.equal, said[stage, case], said[stage, case, "alone"]))


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("case", [*WATCHED, *RECTIFIED])
def test_a_stage_of_zero_comes_to_what_ddp_does(
    stage: str, case: str, said: Any, folder: Path
) -> None:
    for a, b in zip(said[stage, case], said["ddp", case], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    run, reference = (open_run(folder / f"{kind} {case}" / "run.h5") for kind in (stage, "ddp"))
    assert run.sources == reference.sources
    norms = np.sqrt(np.einsum("stii->sti", reference.gram()))
    gap = abs(run.gram() - reference.gram()) / (norms[..., :, None] * norms[..., None, :])
    # AdamW divides what is nearly zero by its own size, so that rounding has an effect: on its
    # update, and on all that comes after it.
    assert np.nanmax(gap) < 1e-5
    gradients = [run.sources.index(source) for source in run.sources if source != "update"]
    same = gap[..., gradients, :][..., gradients]
    assert np.nanmax(same if case == "window" else same[:1]) < 1e-6
    for column in ("lr", "n_micro", "skipped"):
        np.testing.assert_array_equal(run.column(column), reference.column(column))
    np.testing.assert_allclose(run.column("clip_scale"), reference.column("clip_scale"), rtol=1e-5)
    if case in WATCHED:
        assert np.any(run.column("clip_scale") < 1)
    else:
        assert np.any(run.rectification()[1]["fired"])


@pytest.mark.parametrize("stage", RESUMED)
def test_a_training_that_was_resumed_ends_and_is_recorded_as_one_that_did_not_stop(
    stage: str, more: Any, folder: Path
) -> None:
    assert all(map(torch.equal, *more[stage]))
    for name in ("run", "beside"):
        again, straight = (
            open_run(folder / stage / place / f"{name}.h5") for place in (".", "straight")
        )
        assert again.sources == straight.sources
        assert "rectified" in again.sources
        assert again.steps.tolist() == straight.steps.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(again.gram(), straight.gram())
        assert all(np.isfinite(again.gram()[1:]).ravel())


@pytest.mark.usefixtures("more")
def test_a_step_that_an_engine_skips_is_marked(folder: Path) -> None:
    run = open_run(folder / "overflow.h5")
    assert run.column("skipped").tolist() == [0, 1, 0, 0]
    own = [run.sources.index(source) for source in ("objective", "update")]
    assert np.isnan(run.gram()[1][:, own, own]).all()
    assert np.isfinite(run.gram()[[0, 2, 3]]).all()


def test_what_cannot_be_had_is_refused(more: Any, folder: Path) -> None:
    for name, pattern in {
        "parameters": "Found parameters offloaded to the CPU.*What works: ZeRO stages 1, 2 and 3",
        "none": "Found ZeRO stage 0|without an optimizer of ZeRO",
        "early": r"`recorder` should be made for the engine.*partial\(Recorder",
        "within": "called between two steps under DeepSpeed.*Found 1 micro-batches",
    }.items():
        assert re.search(pattern, more.get(name, "")), (name, more.get(name))
    assert not (folder / "parameters.h5").exists()
