"""What the events of a `transformers.Trainer` leave unsaid: by whom, and what clipping did."""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from transformers import Trainer, TrainerControl

from geffect import distributed
from geffect.capture import Recorder, StopWhen
from geffect.losses import check_no_step_inside
from geffect.optimizers import unwrapped

STEPS_IN_BACKWARD = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")
"""Optimizers, as the Trainer knows them, that are done when the backward pass is."""

INSTEAD = (
    "What works: an ordinary optimizer, also under DDP, FSDP2 or DeepSpeed ZeRO; or train as you "
    "do, save checkpoints, and record what `geffect.replay` finds in them."
)


@dataclass(frozen=True)
class Loop:
    """The loop that fires an event: its Trainer, and the gradient norm it found before clipping."""

    trainer: Trainer
    grad_norm: Tensor | float | None


def firing_loop() -> Loop:
    """The loop that fires the event which is being handled.

    Events come with model, optimizer and state. They lack the Trainer, who has the log and the
    precision, and the gradient norm before clipping, which the gradients do not show afterwards.
    Both stand in the frame that the event was fired from: `self` is a Trainer there, and its local
    variable `grad_norm`, which it logs later, is set when `on_pre_optimizer_step` fires.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(
            "The events of `GEffectCallback` should be fired by a `transformers.Trainer`. Found "
            "none among the callers. In a loop of your own use `geffect.Recorder`."
        )
    return Loop(frame.f_locals["self"], frame.f_locals.get("grad_norm"))


def is_running(trainer: Trainer) -> bool:
    """Whether a thread of this process is in a method of the Trainer."""
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_locals.get("self") is trainer:
                return True
            caller = caller.f_back
    return False


def clip_scale(grad_norm: Tensor | float | None, max_grad_norm: float | None) -> float:
    """What clipping has multiplied the gradient by: min(1, max norm / (norm + 1e-6)).

    `grad_norm` is the norm before. Computed as torch does it, in the type of the norm, so that it
    is the very number.

    >>> round(clip_scale(torch.tensor(4.0), 1.0), 6), clip_scale(torch.tensor(0.5), 1.0)
    (0.25, 1.0)
    """
    if not max_grad_norm:
        return 1.0
    if grad_norm is None:
        raise RuntimeError(
            "The loop of the Trainer should keep the gradient norm in a variable `grad_norm`, as "
            "that of transformers does. Found none, so how far gradients are clipped cannot be "
            "told. Pass max_grad_norm=0.0, and clip in a callback that is added after this one."
        )
    return float(torch.clamp(max_grad_norm / (torch.as_tensor(grad_norm) + 1e-6), max=1.0))


def current_scale(scaler: GradScaler | None) -> float:
    """What a GradScaler multiplies the loss by. It is smaller after a step that it has skipped."""
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def scale_left(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> float:
    """What the gradients are still multiplied by: the loss scale, until the scaler takes it out.

    Older Trainers leave that to the optimizer's step where nothing is clipped.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stage = scaler._per_optimizer_states[id(unwrapped(optimizer))]["stage"]
    return current_scale(scaler) if stage is OptState.READY else 1.0


def model_of(trainer: Trainer) -> Any:
    """What the Trainer computes losses with, less what averages gradients: model, or engine."""
    return trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model


def check_gradients_can_be_had(trainer: Trainer, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse training in which no gradient is there to be seen between backward and step."""
    model = model_of(trainer)
    distributed.check_layout(model)
    found = _without_gradients(model, optimizer)
    if found:
        raise RuntimeError(
            "Training should leave the gradient of the step in `.grad` until the optimizer steps. "
            f"Found {found} {INSTEAD}"
        )
    # Those with the Trainer's own hook, which averages over processes what FSDP2 does not manage,
    # are fine, and so are those with an engine's.
    check_no_step_inside(
        parameter
        for parameter in model.parameters()
        if not getattr(parameter, "_replicated_grad_hook_registered", False)
        and not distributed.is_in_engine(parameter)
    )


def begun_recorder(
    recorder: Recorder | Callable[..., Recorder], trainer: Trainer, until_trained: ExitStack
) -> Recorder:
    """The recorder of a training that begins: the one that is given, or one that is made now."""
    step, model = trainer.state.global_step, model_of(trainer)
    if not isinstance(recorder, Recorder):
        resumed = {"resume": True, "overwrite": False, "next_step": step} if step else {}
        return until_trained.enter_context(recorder(model, **resumed))
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "`recorder` should be made for the engine that DeepSpeed trains, which is there when "
            "training begins. Found one that was made before. Pass what makes it: "
            'functools.partial(Recorder, path="run.h5").'
        )
    if step and recorder.next_step != step:
        raise ValueError(
            f"`recorder` should go on with step {step}, as the checkpoint does. Found "
            f"{recorder.next_step}. Pass Recorder(..., resume=True, next_step={step})."
        )
    return recorder


def stop_if_due(stop: StopWhen | None, control: TrainerControl) -> None:
    """Tell a Trainer to end after this step, if a rule says so."""
    if stop is not None and stop.fired is not None:
        control.should_training_stop = True


def _without_gradients(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
    kind = None if optimizer is None else type(unwrapped(optimizer)).__name__
    if kind in STEPS_IN_BACKWARD:
        return f"`{kind}`, which steps each layer inside of the backward pass."
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.parameters()):
        return "optimizers that step inside of the backward pass and free the gradient there."
    return None
