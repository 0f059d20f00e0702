"""What may happen to a Trainer that is watched: it stops, resumes, overflows, cannot write."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from geffect import RunFileError, open_run
from geffect.capture import at
from geffect.layers import describe
from geffect.store.writer import RunWriter
from geffect.trainers import GEffectCallback
from geffect.trainers.loop import clip_scale, scale_left
from tests.utils import shallow as tiny
from tests.utils.trainers import At, Noting, Scaled, same, stop, trainer

PROBES = {"forget": tiny.batch(50, rows=1), "retain": [tiny.batch(s) for s in (51, 52)]}

SAVING = {"save_strategy": "steps", "save_steps": 2}


def fail(**_: Any) -> None:
    raise KeyError("out of luck")


@pytest.mark.parametrize("end", [stop, fail])
def test_a_resumed_training_continues_the_file_without_gap_or_double(
    end: Any, tmp_path: Path
) -> None:
    whole = trainer(
        tmp_path / "whole",
        tiny.llama(dropout=0.3),
        GEffectCallback(tmp_path / "whole.h5", probes=PROBES),
    )
    whole.train()
    path = tmp_path / "run.h5"
    # Checkpoints at 2 and 4; it ends in step 5, whose row is written, as is that of step 4.
    event, step = ("on_step_end", 5) if end is stop else ("on_optimizer_step", 4)
    watching = GEffectCallback(path, probes=PROBES)
    broken = trainer(tmp_path, tiny.llama(dropout=0.3), watching, At(event, step, end), **SAVING)
    if end is stop:
        broken.train()
        assert open_run(path).state == "complete"
    else:
        with pytest.raises(KeyError, match="out of luck"):
            broken.train()
        assert open_run(path).state == "open"
        watching.close()
    assert open_run(path).steps.tolist() == [0, 1, 2, 3, 4]
    resumed = trainer(
        tmp_path, tiny.llama(dropout=0.3), GEffectCallback(path, probes=PROBES), **SAVING
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    straight, mended = open_run(tmp_path / "whole.h5"), open_run(path)
    assert mended.steps.tolist() == straight.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(mended.drawn) == 6  # rows
    assert np.array_equal(mended.gram(), straight.gram())
    assert mended.state == "complete"


def test_the_same_callback_goes_on_where_training_raised(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    accident = At("on_optimizer_step", 4, fail)
    training = trainer(
        tmp_path, tiny.llama(), GEffectCallback(path, probes=PROBES), accident, **SAVING
    )
    with pytest.raises(KeyError):
        training.train()
    training.remove_callback(accident)
    training.train(resume_from_checkpoint=True)
    assert open_run(path).steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert open_run(path).state == "complete"


def test_an_attempt_that_begins_again_replaces_its_own_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    accident = At("on_optimizer_step", 2, fail)
    training = trainer(tmp_path, tiny.llama(), GEffectCallback(path, probes=PROBES), accident)
    with pytest.raises(KeyError):
        training.train()
    training.remove_callback(accident)
    training.train()
    assert open_run(path).steps.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(FileExistsError, match=r"run\.h5"):
        training.train()


def restarted(tmp_path: Path) -> None:
    """Another Trainer and another callback in the same process."""
    again = GEffectCallback(tmp_path / "run.h5", probes=PROBES, overwrite=True)
    trainer(tmp_path, tiny.llama(), again).train()
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert open_run(tmp_path / "run.h5").state == "complete"


def test_a_training_that_was_interrupted_leaves_its_file_to_the_next(tmp_path: Path) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES)
    first = trainer(tmp_path, tiny.llama(), watching, At("on_substep_end", 3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1, 2]
    restarted(tmp_path)


def test_a_training_that_goes_on_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"

    def intrude(**_: Any) -> None:
        with pytest.raises(RunFileError, match="should have one writer"):
            restarted(tmp_path)

    watching = GEffectCallback(path, probes=PROBES)
    trainer(tmp_path, tiny.llama(), watching, At("on_step_begin", 2, intrude)).train()
    assert open_run(path).steps.tolist() == [0, 1, 2, 3, 4, 5]


class Failing(list[Any]):
    """Batches; a later time has none that is whole."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return iter([{}] if self.times == 4 else [tiny.batch(0)])


def test_an_error_of_the_callback_closes_the_file(tmp_path: Path) -> None:
    recorder = GEffectCallback(tmp_path / "run.h5", probes={"facts": Failing()})
    training = trainer(tmp_path, tiny.llama(), recorder)
    with pytest.raises(ValueError, match=r"`labels`.*[\s\S]*data of risk `facts`"):
        training.train()
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1]
    other = describe(tiny.llama())
    RunWriter(tmp_path / "run.h5", other, overwrite=True).close(complete=False)
    training.train()  # a retry of the same callback still replaces what it began
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("others", "update"),
    [
        ({"forget": PROBES["forget"]}, True),
        ({**PROBES, "facts": tiny.batch(0)}, True),
        (PROBES, False),
    ],
)
def test_a_resumed_training_has_the_sources_of_the_file(
    others: Any, update: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.h5"
    first = GEffectCallback(path, probes=PROBES)
    trainer(tmp_path, tiny.llama(), first, At("on_step_end", 3, stop), **SAVING).train()
    before = path.read_bytes()
    changed = GEffectCallback(path, probes=others, update=update)
    resumed = trainer(tmp_path, tiny.llama(), changed, **SAVING)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`probes`, `update` and the rectifier should stay"):
            resumed.train(resume_from_checkpoint=True)
    with pytest.raises(FileExistsError):  # nor is the file its own now
        resumed.train()
    assert path.read_bytes() == before
    swapped = GEffectCallback(path, probes=dict(reversed(PROBES.items())))
    trainer(tmp_path, tiny.llama(), swapped, **SAVING).train(resume_from_checkpoint=True)
    run = open_run(path)
    assert run.sources == ("objective", "forget", "retain", "update")
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isfinite(run.gram()).all()


def test_a_resumed_training_without_its_file_says_where_the_new_one_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.h5"
    trainer(tmp_path, tiny.llama(), At("on_step_end", 3, stop), **SAVING).train()
    recorder = GEffectCallback(path, probes=PROBES)
    with caplog.at_level(logging.WARNING, logger="geffect"):
        trainer(tmp_path, tiny.llama(), recorder, **SAVING).train(resume_from_checkpoint=True)
    said = [r.getMessage() for r in caplog.records if "begins there" in r.getMessage()]
    assert len(said) == 1
    assert "run.h5` has no row" in said[0]
    assert "at step 2" in said[0]
    assert open_run(path).steps.tolist() == [2, 3, 4, 5]


def test_a_schedule_that_is_never_due_is_refused(tmp_path: Path) -> None:
    never = GEffectCallback(tmp_path / "run.h5", probes=PROBES, when=at(6, 100))
    with pytest.raises(ValueError, match="Found none from step 0 to 5"):
        trainer(tmp_path, tiny.llama(), never).train()
    assert not (tmp_path / "run.h5").exists()


def test_a_schedule_that_is_over_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    first = GEffectCallback(path, probes=PROBES, when=at(1))
    trainer(tmp_path, tiny.llama(), first, At("on_step_end", 3, stop), **SAVING).train()
    rest = GEffectCallback(path, probes=PROBES, when=at(1))
    trainer(tmp_path, tiny.llama(), rest, **SAVING).train(resume_from_checkpoint=True)
    assert open_run(path).steps.tolist() == [1]
    assert open_run(path).state == "complete"


# Half precision.


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the state back that all accelerators of a process share."""
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("optimizer", "limit"), [("adamw_torch", 0.1), ("adamw_torch_fused", 0.0)])
def test_a_step_that_overflows_is_recorded_as_skipped(
    optimizer: str, limit: float, tmp_path: Path
) -> None:
    options = {"optim": optimizer, "max_grad_norm": limit, "adam_epsilon": 1e-4}
    plain = trainer(tmp_path, tiny.llama(), kind=Scaled, **options)
    plain.train()
    training = trainer(
        tmp_path, tiny.llama(), GEffectCallback(tmp_path / "run.h5", probes=PROBES), kind=Scaled,
        **options,
    )  # fmt: skip
    training.train()
    assert same(plain.model.state_dict(), training.model.state_dict())
    assert same(plain.optimizer.state_dict(), training.optimizer.state_dict())
    assert training.accelerator.scaler.get_scale() == 512.0
    run = open_run(tmp_path / "run.h5")
    assert run.column("skipped").tolist() == [0, 1, 0, 0, 0, 0]
    assert np.isnan(run.column("clip_scale")).tolist() == [step == 1 for step in range(6)]
    objective, update = run.index("objective"), run.index("update")
    skipped, taken = run.gram()[1], np.delete(run.gram(), 1, axis=0)
    assert np.isnan(skipped[:, [objective, update]]).all()
    assert np.isfinite(skipped[:, 1:3, 1:3]).all()
    assert np.isfinite(taken).all()
    assert (taken[:, :, update, update].sum(axis=1) > 0).all()
    # Unscaled: of the size that a training in float32 finds.
    exact = trainer(tmp_path, tiny.llama(), kind=Noting)
    exact.train()
    norm = torch.cat([g.flatten() for g in exact.unclipped[0]]).norm()
    assert run.gram()[0, :, 0, 0].sum() ** 0.5 == pytest.approx(float(norm), rel=1e-2)
    logged = [e["step"] for e in training.state.log_history if "geffect/unlearning_g_effect" in e]
    assert logged == [1, 3, 4, 5, 6]


def test_a_scale_is_left_until_the_scaler_has_taken_it_out() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(2)).sum()).backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[1024.0, 1024.0]]
    assert scale_left(scaler, optimizer) == 1024.0
    scaler.unscale_(optimizer)
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    assert scale_left(scaler, optimizer) == scale_left(None, optimizer) == 1.0
    assert scale_left(torch.amp.GradScaler("cpu", enabled=False), optimizer) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clip_scale_is_the_number_that_torch_multiplies_by(dtype: torch.dtype) -> None:
    for size in (1e-4, 0.9, 1.1, 3e3):
        parameter = nn.Parameter(torch.zeros(5, dtype=dtype))
        parameter.grad = torch.full((5,), size, dtype=dtype)
        before = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
        expected = before * torch.tensor(clip_scale(norm, 2.0), dtype=dtype)
        assert torch.equal(parameter.grad, expected)


# A file that cannot be written.


def break_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunWriter.append

    def failing(self: RunWriter, row: Any) -> None:
        if row.step == step:
            raise RunFileError(f"Run file `{self.path}` should be writable. Found: no space.")
        append(self, row)

    monkeypatch.setattr(RunWriter, "append", failing)


def test_a_file_that_cannot_be_written_stops_training_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(2, monkeypatch)
    recorder = GEffectCallback(tmp_path / "run.h5", probes=PROBES)
    with pytest.raises(RunFileError, match=r"run\.h5"):
        trainer(tmp_path, tiny.llama(), recorder).train()
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1]


class Counted(list[Any]):
    """Batches that count how often they are gone through."""

    times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return super().__iter__()


def test_or_is_warned_of_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_at(2, monkeypatch)
    plain = trainer(tmp_path, tiny.llama())
    plain.train()
    counted = Counted([tiny.batch(0)])
    recorder = GEffectCallback(tmp_path / "run.h5", probes={"forget": counted}, on_error="warn")
    training = trainer(tmp_path, tiny.llama(), recorder)
    with caplog.at_level(logging.WARNING, logger="geffect"):
        training.train()
    # A look at the first batch, and three steps: no probe costs time that is not recorded.
    assert counted.times == 1 + 3
    assert sum("should be writable" in record.getMessage() for record in caplog.records) == 1
    assert same(plain.model.state_dict(), training.model.state_dict())
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1]
    assert open_run(tmp_path / "run.h5").state == "open"
