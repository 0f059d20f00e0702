"""The callback: records the gradients of a `transformers.Trainer` that knows nothing of it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from geffect import distributed, gram
from geffect.capture.collector import Measured
from geffect.capture.keep import Keep
from geffect.capture.manifest import described
from geffect.capture.probes import RiskGradient, RiskSet, as_batches, risk_gradient
from geffect.capture.recording import OnError, Recording
from geffect.capture.schedule import Schedule
from geffect.capture.schedule import every as every_kth
from geffect.gradients import Vector
from geffect.sources import FORGET, OBJECTIVE, RETAIN, UPDATE, is_risk

from .loop import (
    Loop,
    check_gradients_can_be_had,
    clip_scale,
    firing_loop,
    loss_scale,
    scale_left,
    unwrapped,
)

SEEN = "seen"
"""The gradient as the optimizer sees it; the objective's is a multiple of it."""

EFFECTS = {FORGET: "unlearning", RETAIN: "retaining"}
"""What the effects on these two risks are called; another one's has the name of the risk."""


@dataclass
class _Step:
    """A step that is being captured, as far as the events have come."""

    number: int
    epoch: float
    probes: Mapping[str, RiskGradient]
    n_micro: int = 1
    grad_norm: float = math.nan  # before clipping; NaN where the Trainer has not taken it
    clip_scale: float = math.nan
    loss_scale: float = 1.0  # before the optimizer's step
    vectors: dict[str, Vector] = field(default_factory=dict)
    weights: dict[str, Mapping[str, float]] = field(default_factory=dict)
    before: Sequence[Tensor] | None = None  # the parameters, where the update is to be recorded
    measured: Measured | None = None  # None while it waits for the update


class GEffectCallback(TrainerCallback):
    """Records G-effects of any `transformers.Trainer`, TRL's among them, into a run file.

        trainer.add_callback(
            GEffectCallback("run.h5", probes={"forget": forget_batches, "retain": retain_batches})
        )

    A row holds the Gram matrices of the gradient of the objective as the Trainer accumulated it, of
    the risk (NLL per answer token) on each set of `probes` at the same parameters and without
    dropout, and of the update that the optimizer made of it. The Trainer ends with the same
    parameters and optimizer state as without, bit for bit. Each row costs a forward and backward
    pass over all probes, their gradients stay in memory during the step, and `update` costs a copy
    of the parameters and of one gradient.

    - `probes`: named data: a batch with `labels`, a list of batches, or a loader that is gone
      through anew each time.
    - `every`: each k-th optimizer step; or `when`, a schedule from `geffect.capture.schedule`.
    - `update`: also record theta after minus theta before.
    - `log`: also hand G-effects and cosines of the whole model to what the Trainer reports to, as
      `geffect/unlearning_g_effect`, `geffect/retaining_g_effect`, `geffect/cosine_objective_retain`
      and so on.
    - `store`, `metadata`, `overwrite`, `on_error`: as those of `Recording`.

    Step s of the file is the one that begins at `state.global_step == s`, from 0; the Trainer logs
    it as s + 1. The objective's gradient is that before clipping, with the factor that clipped it
    beside it in `clip_scale`. A gradient that is not finite leaves a row without objective; where a
    GradScaler skipped its step, `skipped` is set and there is no update either. The loss of the
    objective is not recorded: no event tells it, and the Trainer logs it.

    A Trainer that resumes from a checkpoint continues the file: rows of steps after the checkpoint
    are dropped, since they come again. After training the file is complete; where training raised
    it stays open, readable, and can be continued. Training in which gradients cannot be had, such
    as DeepSpeed, is refused when it begins.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        probes: Mapping[str, RiskSet],
        every: int = 1,
        when: Schedule | None = None,
        update: bool = True,
        log: bool = True,
        store: str | Keep = "gram",
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        self._path = path
        self._probes = _checked(probes)
        self._due = every_kth(every) if when is None else when
        self._update, self._log, self._store = update, log, store
        self._metadata, self._overwrite, self._on_error = metadata, overwrite, on_error
        self._sources = (OBJECTIVE, *self._probes, *([UPDATE] if update else []))
        self._recording: Recording | None = None
        self._step: _Step | None = None

    def close(self, *, complete: bool = False) -> None:
        """Let go of the file, where training raised and this process is to use it for more."""
        if self._recording is not None:
            self._recording.close(complete=complete)
        self._recording = self._step = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be recorded, and open the file."""
        model, trainer = kwargs["model"], firing_loop().trainer
        check_gradients_can_be_had(trainer, model, kwargs["optimizer"])
        # Open still: an earlier attempt of this training raised, and its file is ours.
        replaces = self._overwrite or self._recording is not None
        self.close()
        resumed = state.global_step > 0
        self._recording = Recording(
            model,
            self._path,
            metadata=self._metadata,
            store=self._store,
            steps=[s for s in range(state.global_step, state.max_steps) if self._due(s)],
            overwrite=replaces and not resumed,
            resume=resumed,
            drop_after=state.global_step - 1 if resumed else None,
            on_error=self._on_error,
            provenance={"trainer": _provenance(trainer, args)},
        )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the gradients of the risks: no gradient of the step is there yet."""
        self._step = None
        if not self._due(state.global_step) or self._has_failed():
            return
        autocast = firing_loop().trainer.compute_loss_context_manager
        self._step = _Step(
            number=state.global_step,
            epoch=math.nan if state.epoch is None else state.epoch,
            probes={
                name: risk_gradient(kwargs["model"], batches, autocast=autocast)
                for name, batches in self._probes.items()
            },
        )

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count the micro-batches, of which the last has no event of its own."""
        if self._step is not None:
            self._step.n_micro += 1

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the gradient of the objective, which has been accumulated, unscaled and clipped."""
        step = self._step
        if step is None:
            return
        parameters = self._opened().parameters
        grads = [parameter.grad for parameter in parameters]
        if all(grad is None for grad in grads):
            raise RuntimeError(
                "A parameter should have a gradient before the optimizer steps. Found none at step "
                f"{step.number}. See whether another callback or the optimizer takes them away, "
                "and add this callback before it."
            )
        self._place(step, grads, firing_loop(), args.max_grad_norm, kwargs["optimizer"])
        if self._update:
            step.before = [parameter.detach().clone() for parameter in parameters]
        else:
            step.measured = self._measured(step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the update, and write the row."""
        step, recording = self._step, self._opened()
        if step is None:
            return
        # Not what accelerate says: it takes a step that a fused optimizer skipped for a step.
        scaler = firing_loop().trainer.accelerator.scaler
        skipped = loss_scale(scaler) < step.loss_scale
        if skipped:
            step.weights.pop(OBJECTIVE, None)
        elif step.before is not None:
            with torch.no_grad():
                # In place: what was the copy of the old parameters becomes the update.
                for before, parameter in zip(step.before, recording.parameters, strict=True):
                    before.neg_().add_(parameter)
            step.vectors[UPDATE] = step.before
            step.weights[UPDATE] = {UPDATE: 1.0}
        if step.measured is None:
            step.measured = self._measured(step)
        with distributed.together():
            recording.write(
                step.number,
                step.measured,
                declared={name: "loss" for name in self._sources if name != UPDATE},
                epoch=step.epoch,
                lr=float(kwargs["optimizer"].param_groups[0]["lr"]),
                n_micro=step.n_micro,
                clip_scale=step.clip_scale,
                skipped=skipped,
                optimizer=described(unwrapped(kwargs["optimizer"])),
                sources=self._sources,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Hand the scores of the step to what the Trainer reports to."""
        step, self._step = self._step, None
        if not self._log or step is None or step.measured is None:
            return
        if OBJECTIVE not in step.measured.names:
            return
        asked = control.should_log
        # Not `trainer.log`: those of TRL would take their own averages for logged, and begin anew.
        Trainer.log(firing_loop().trainer, _scores(step.measured))
        control.should_log = asked  # which every log answers with "done"

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Mark the file as complete."""
        self.close(complete=True)

    def _place(
        self,
        step: _Step,
        grads: Vector,
        loop: Loop,
        max_grad_norm: float | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Name the gradients of the step, and say what the objective's is in terms of them."""
        step.vectors = {name: probe.vector for name, probe in step.probes.items()}
        step.weights = {name: {name: 1.0} for name in step.probes}
        scaler = loop.trainer.accelerator.scaler
        step.loss_scale = loss_scale(scaler)
        if loop.grad_norm is not None:
            step.grad_norm = float(loop.grad_norm)
            if not math.isfinite(step.grad_norm):
                return  # a gradient without direction
        step.clip_scale = clip_scale(loop.grad_norm, max_grad_norm)
        left = scale_left(scaler, optimizer)
        # A copy, where it is to be compared with the update: optimizers may use its memory.
        step.vectors[SEEN] = (
            [None if g is None else g.clone() for g in grads] if self._update else grads
        )
        step.weights = {OBJECTIVE: {SEEN: 1 / (step.clip_scale * left)}, **step.weights}

    def _measured(self, step: _Step) -> Measured:
        losses = {name: probe.loss for name, probe in step.probes.items()}
        measured = self._opened().measure(step.number, step.vectors, losses, step.weights)
        if OBJECTIVE in measured.names:
            _check_norm(measured, step)
        return measured

    def _has_failed(self) -> bool:
        # Of several processes one writes, and passes over the probes are taken by all or by none.
        (failures,) = distributed.mean([float(self._opened().failed)])
        return failures > 0

    def _opened(self) -> Recording:
        if self._recording is None:
            raise RuntimeError(
                "`GEffectCallback` should be told that training begins. Found a step before that. "
                "Add it to the Trainer before `train()`."
            )
        return self._recording


def _checked(probes: Mapping[str, RiskSet]) -> Mapping[str, RiskSet]:
    wrong = [name for name in probes if not is_risk(name) or "/" in name]
    if wrong or not probes:
        raise ValueError(
            "`probes` should have at least one set of batches, under names that are no names of "
            f"other gradients and have no slash. Found {', '.join(wrong) or 'none'}. "
            'Pass probes={"forget": ..., "retain": ...}.'
        )
    for batches in probes.values():
        as_batches(batches)
    return dict(probes)


def _provenance(trainer: Trainer, args: TrainingArguments) -> dict[str, Any]:
    return {
        "class": type(trainer).__name__,
        "max_grad_norm": args.max_grad_norm,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "seed": args.seed,
    }


def _check_norm(measured: Measured, step: _Step) -> None:
    """Refuse a gradient whose length is not the one that the Trainer has found before clipping."""
    place = measured.names.index(OBJECTIVE)
    norm = float(gram.norm(measured.gram.sum(dim=0), place))
    # Rounding of half precision aside.
    if abs(norm - step.grad_norm) > 0.02 * step.grad_norm:
        raise RuntimeError(
            f"The gradient before clipping should have the norm that the Trainer logs, "
            f"{step.grad_norm:.6g}. Found {norm:.6g} at step {step.number}: the gradients were "
            "changed between clipping and this callback. Add it before the callback that does so."
        )


def _scores(measured: Measured) -> dict[str, float]:
    """G-effects and cosines of the whole model, by the names under which they are logged."""
    K = measured.gram.sum(dim=0)
    objective = measured.names.index(OBJECTIVE)
    scores = {}
    for place, risk in enumerate(measured.names):
        if is_risk(risk):
            effect = EFFECTS.get(risk, risk)
            scores[f"geffect/{effect}_g_effect"] = float(gram.inner(K, place, objective))
            scores[f"geffect/cosine_objective_{risk}"] = float(gram.cosine(K, objective, place))
    return scores
