"""The trainer for unlearning under DeepSpeed: two processes, against DDP and against itself."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from geffect import Recorder, Rectifier, open_run
from geffect.objectives import NPO, GradDiff
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import tiny, two_ranks
from tests.utils.engines import loaded, whole_parameters
from tests.utils.unlearning_runs import alike_items, arguments

if find_spec("deepspeed") is None:  # nothing but an engine needs to load it
    pytest.skip("needs deepspeed", allow_module_level=True)

RECTIFIED: dict[str, Any] = {"gradient": {}, "update": {"space": "update"}}
ZERO: dict[int, dict[str, Any]] = {
    1: {},
    2: {"offload_optimizer": {"device": "cpu"}},
    3: {},
}
"""Stages, and what is said of each beside its number."""

CASES = [(space, window) for space in RECTIFIED for window in (1, 2)]
RESUMED = [2, 3]


def trainer_of(
    folder: Path, space: str, window: int, stage: int | None, **options: Any
) -> UnlearningTrainer:
    model: Any = tiny.llama()
    model.model.layers = model.model.layers[:1]
    if stage is not None:
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, **ZERO[stage]},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return UnlearningTrainer(
        model,
        arguments(
            folder, max_grad_norm=0.5, num_train_epochs=1, gradient_accumulation_steps=window,
            optim="adamw_torch", learning_rate=0.01, **options,
        ),
        objective=GradDiff(forget=NPO(beta=0.1), weight=0.01),
        rectifier=Rectifier(model, **RECTIFIED[space]),
        recorder=partial(Recorder, path=folder / "run.h5"),
        forget=alike_items(12, 0),
        retain=alike_items(14, 100),
    )  # fmt: skip


def ended(trainer: UnlearningTrainer, **options: Any) -> dict[str, Any]:
    trainer.train(**options)
    assert trainer.is_deepspeed_enabled == bool(trainer.args.deepspeed)
    fired = [log.get("rectify/fired") for log in trainer.state.log_history if "loss" in log]
    return {"parameters": whole_parameters(trainer.model_wrapped), "fired": fired}


def in_processes(folder: str) -> Any:
    """What training comes to under DDP and at stages of ZeRO, and resumed there."""
    two_ranks.tell_place()
    loaded()
    said = {}
    for stage in (None, *ZERO):  # DDP comes first: an engine is said to all that follow
        for space, window in CASES if stage != 1 else CASES[1::2]:
            AcceleratorState._reset_state(reset_partial_state=True)
            place = Path(folder, f"{stage} {space} {window}")
            saved = (
                {"save_strategy": "steps", "save_steps": 2}
                if window == 1 and stage in RESUMED
                else {}
            )
            said[stage, space, window] = ended(trainer_of(place, space, window, stage, **saved))
            if saved:
                AcceleratorState._reset_state(reset_partial_state=True)
                again = trainer_of(place, space, window, stage, **saved)
                said[stage, space, "resumed"] = ended(
                    again, resume_from_checkpoint=str(place / "out" / "checkpoint-2")
                )
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes write."""
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[Any, Any]:
    """What the first of two processes has said."""
    return two_ranks.run(in_processes, str(folder))[0]


@pytest.mark.parametrize(
    ("stage", "space", "window"),
    [(1, *case) for case in CASES[1::2]] + [(stage, *case) for stage in RESUMED for case in CASES],
)
def test_a_stage_of_zero_ends_where_ddp_does(
    space: str, window: int, stage: int, said: Any, folder: Path
) -> None:
    ours, theirs = said[stage, space, window], said[None, space, window]
    for a, b in zip(ours["parameters"], theirs["parameters"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert ours["fired"] == theirs["fired"]
    run, reference = (
        open_run(folder / f"{kind} {space} {window}" / "run.h5") for kind in (stage, None)
    )
    norms = np.sqrt(np.einsum("stii->sti", reference.gram()))
    gap = abs(run.gram() - reference.gram())
    assert np.nanmax(gap / (norms[..., :, None] * norms[..., None, :])) < 2e-6
    np.testing.assert_array_equal(run.column("lr"), reference.column("lr"))


@pytest.mark.parametrize("stage", RESUMED)
@pytest.mark.parametrize("space", RECTIFIED)
def test_a_training_that_was_resumed_ends_as_one_that_did_not_stop(
    space: str, stage: int, said: Any
) -> None:
    again, through = (said[stage, space, kind]["parameters"] for kind in ("resumed", 1))
    assert all(map(torch.equal, again, through))
