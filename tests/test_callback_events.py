"""What may happen to a Trainer that is watched: it stops, resumes, overflows, hides gradients."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from geffect import RunFileError, distributed, open_run
from geffect.store.writer import RunWriter
from geffect.trainers import GEffectCallback
from geffect.trainers.loop import clip_scale, firing_loop, scale_left
from tests import tiny, trainers, two_ranks
from tests.trainers import Noting, same, trainer

PROBES = {"forget": tiny.batch(50, rows=1), "retain": [tiny.batch(s) for s in (51, 52)]}

SAVING = {"save_strategy": "steps", "save_steps": 2}


class At(TrainerCallback):
    """Does something when an event of one step fires."""

    def __init__(self, event: str, step: int, act: Any) -> None:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                act(control=control, **kwargs)

        setattr(self, event, handle)


def stop(control: Any, **_: Any) -> None:
    control.should_training_stop = True


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
    # Checkpoints at 2 and 4; it ends in step 5, of which the row is written, as is that of step 4.
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


# Half precision.


class Scaled(Trainer):
    """A Trainer that scales its loss on the CPU as it would in float16 on a GPU."""

    overflows = (1,)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step in self.overflows:
            model.lm_head.weight.grad[0, 0] = torch.inf
        return loss


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


# What is refused.


def test_deepspeed_is_refused_before_training(tmp_path: Path) -> None:
    def pretend(**_: Any) -> None:
        training.is_deepspeed_enabled = True

    training = trainer(
        tmp_path, tiny.llama(), At("on_train_begin", 0, pretend),
        GEffectCallback(tmp_path / "run.h5", probes=PROBES),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Found DeepSpeed.*What works: DDP or FSDP2.*replay"):
        training.train()
    assert not (tmp_path / "run.h5").exists()


def layerwise(model: nn.Module) -> Any:
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    return LayerWiseDummyOptimizer(optimizer_dict=inner, lr=0.1)


class AdaLomo(torch.optim.SGD):
    """By its name, an optimizer that steps in its own backward pass."""


@pytest.mark.parametrize("make", [layerwise, lambda model: AdaLomo(model.parameters(), lr=0.1)])
def test_optimizers_that_step_inside_of_the_backward_pass_are_refused(
    make: Any, tmp_path: Path
) -> None:
    model = tiny.llama()
    training = trainer(tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes=PROBES))
    training.optimizer = make(model)
    with pytest.raises(RuntimeError, match=r"which steps each layer inside.*What works"):
        training.train()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_optimizers_that_are_fused_with_the_backward_pass_are_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = tiny.llama()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    training = trainer(tmp_path, model, GEffectCallback(tmp_path / "run.h5", probes=PROBES))
    with pytest.raises(RuntimeError, match="free the gradient there"):
        training.train()


def test_gradients_that_are_gone_before_the_step_are_missed(tmp_path: Path) -> None:
    def take(model: nn.Module, **_: Any) -> None:
        model.zero_grad()

    training = trainer(
        tmp_path, tiny.llama(), At("on_pre_optimizer_step", 2, take),
        GEffectCallback(tmp_path / "run.h5", probes=PROBES),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"should have a gradient .* none at step 2"):
        training.train()


def test_gradients_that_something_else_has_changed_are_noticed(tmp_path: Path) -> None:
    def halve(model: nn.Module, **_: Any) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5

    change = At("on_pre_optimizer_step", 1, halve)
    for update in (False, True):
        late = GEffectCallback(tmp_path / f"{update}.h5", probes=PROBES, update=update)
        with pytest.raises(RuntimeError, match="changed between clipping and this callback"):
            trainer(tmp_path, tiny.llama(), change, late).train()
    first = GEffectCallback(tmp_path / "first.h5", probes=PROBES)
    trainer(tmp_path, tiny.llama(), first, change).train()
    assert len(open_run(tmp_path / "first.h5").steps) == 6


def test_events_of_something_else_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"should be fired by a `transformers\.Trainer`"):
        firing_loop()


@pytest.mark.parametrize("name", ["objective", "update", "retain_ema", "objective.forget", "a/b"])
def test_probes_have_names_of_their_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`probes` should have .* Found {name}"):
        GEffectCallback(tmp_path / "run.h5", probes={name: tiny.batch(0)})
    with pytest.raises(ValueError, match="`probes` should have at least one"):
        GEffectCallback(tmp_path / "run.h5", probes={})
    with pytest.raises(TypeError, match="a list of batches or a loader"):
        GEffectCallback(tmp_path / "run.h5", probes={"forget": iter([tiny.batch(0)])})


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
    assert counted.times == 3  # no probe costs time that is not recorded
    assert sum("run.h5" in record.getMessage() for record in caplog.records) == 1
    assert same(plain.model.state_dict(), training.model.state_dict())
    assert open_run(tmp_path / "run.h5").steps.tolist() == [0, 1]
    assert open_run(tmp_path / "run.h5").state == "open"


# Two processes.


class Sharding(Trainer):
    """A Trainer that shards its model by FSDP2, which it does by itself on GPUs alone."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        self.is_fsdp_enabled = True


def whole(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if distributed.is_sharded(tensor) else tensor.clone()).numpy()


def of_two(kind: type[Trainer], folder: str) -> list[Any]:
    """What one of two processes ends with: unwatched, watched, and where the file fails."""
    rank = distributed.rank()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in told.items()}
    ends = []
    for name in (None, "run.h5", "full.h5"):
        training = trainer(Path(folder), tiny.llama(), kind=kind, data=trainers.samples(10))
        if name:
            path = Path(folder) / name
            training.add_callback(GEffectCallback(path, probes=PROBES, on_error="warn"))
        if name == "full.h5":
            break_at(1, pytest.MonkeyPatch())  # this process ends soon
        training.train()
        ends.append([whole(p) for p in training.model.parameters()])
        assert any(map(distributed.is_sharded, training.model.parameters())) == (kind is Sharding)
    return ends


@pytest.mark.parametrize("kind", [Trainer, Sharding], ids=["ddp", "fsdp2"])
def test_two_processes_record_what_one_does(kind: type[Trainer], tmp_path: Path) -> None:
    for plain, *watched in two_ranks.run(of_two, kind, str(tmp_path)):
        for parameters in watched:
            assert all(map(np.array_equal, plain, parameters))
    assert open_run(tmp_path / "full.h5").steps.tolist() == [0]
    one = GEffectCallback(tmp_path / "one.h5", probes=PROBES)
    options = {"per_device_train_batch_size": 2, "data": trainers.samples(10)}
    trainer(tmp_path, tiny.llama(), one, **options).train()
    alone, together = open_run(tmp_path / "one.h5"), open_run(tmp_path / "run.h5")
    assert together.steps.tolist() == alone.steps.tolist() == [0, 1, 2, 3]
    assert together.column("n_micro").tolist() == [3, 2, 3, 2]
    assert together.column("clip_scale") == pytest.approx(alone.column("clip_scale"), rel=1e-3)
    for name in ("forget", "retain"):
        assert together.losses()[name] == pytest.approx(alone.losses()[name], rel=1e-4)
    # AdamW divides what is nearly zero by its own size, so that rounding has an effect.
    K = [run.gram().sum(axis=1) for run in (alone, together)]
    np.testing.assert_allclose(K[0][0, :3, :3], K[1][0, :3, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(K[0], K[1], rtol=1e-2, atol=1e-3 * K[0].max())
