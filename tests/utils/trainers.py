"""Trainers of tiny models, and one that notes what goes on inside of it."""

import copy
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, imports, other
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from geffect import distributed
from tests.utils import tiny

# Every Trainer asks for some twenty packages, each time on the disk.
imports._is_package_available = cache(imports._is_package_available)
# It asks whether a model is an engine: where nobody has loaded DeepSpeed, none is. Loading it would
# have us, too, look for engines from then on.
other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def samples(count: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of a data set; with two micro-batches a step, the last window is not full."""
    rows = [tiny.batch(seed + i, rows=1) for i in range(count)]
    return [{name: value[0] for name, value in row.items()} for row in rows]


def trainer(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    data: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer on the CPU: 2 epochs of 3 steps; each third one has one micro-batch of 2."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(
        model,
        TrainingArguments(**arguments | options),
        train_dataset=samples() if data is None else data,
        callbacks=list(callbacks),
    )


class Noting(Trainer):
    """A Trainer that notes parameters, data and unclipped gradients of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.models: list[nn.Module] = []  # copies, as each step begins, and at the end
        self.windows: list[list[dict[str, Tensor]]] = []
        self.unclipped: list[list[Tensor]] = []
        self.clipped: list[list[Tensor]] = []
        self.add_callback(_Notes(self))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The step, and a note of what was accumulated."""
        self.windows[-1].append({name: value.clone() for name, value in inputs.items()})
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.unclipped[-1] = [p.grad.clone() for p in model.parameters()]
        return loss


class _Notes(TrainerCallback):
    def __init__(self, trainer: Noting) -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.trainer.models.append(copy.deepcopy(model))
        self.trainer.windows.append([])
        self.trainer.unclipped.append([])

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.trainer.clipped.append([p.grad.clone() for p in model.parameters()])

    def on_train_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.trainer.models.append(copy.deepcopy(model))


class At(TrainerCallback):
    """Does something when an event of one step fires."""

    def __init__(self, event: str, step: int, act: Any) -> None:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                act(control=control, **kwargs)

        setattr(self, event, handle)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def stop(control: Any, **_: Any) -> None:
    control.should_training_stop = True


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
