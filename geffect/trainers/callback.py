"""The callback: records the gradients of a `transformers.Trainer` that knows nothing of it."""

import logging
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from geffect import distributed
from geffect.capture.guard import OnError
from geffect.capture.recording import IfExists, Recording
from geffect.capture.schedule import Schedule
from geffect.capture.schedule import every as every_kth
from geffect.capture.stopping import StopWhen
from geffect.capture.store_options import StoreOptions
from geffect.gradients import Gradients, GradientTransform
from geffect.hooks import Hooks, weakly
from geffect.optimizers import unwrapped
from geffect.projection.listeners import listeners
from geffect.risk import RiskSet, noting_risk, risk_gradient
from geffect.sources import (
    AVERAGE,
    OBJECTIVE,
    RECTIFIED,
    UPDATE,
)
from geffect.steps import StepFollower
from geffect.store.paths import place_of

from .at_copy import told
from .checks import check_begins, check_probes, check_sources, check_training
from .loop import (
    firing_loop,
    is_running,
    model_of,
    scale_left,
    stop_if_due,
)
from .step import CapturedStep
from .trackers import Reports, Trackers, log_scores

log = logging.getLogger(__name__)

_open_callbacks: "weakref.WeakSet[GEffectCallback]" = weakref.WeakSet()
"""Those that have a file open: of a training that goes on, or of one that raised."""


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
    - `every`: captures each k-th optimizer step.
    - `when`: a schedule from `geffect.capture.schedule` in its place.
    - `update`: also record theta after minus theta before.
    - `log`: also hand G-effects and cosines of the whole model to what the Trainer reports to, as
      `geffect/unlearning_g_effect`, `geffect/retaining_g_effect`, `geffect/cosine_objective_retain`
      and so on. Those of adapters are effects in the space of their factors, and do not compare
      with others: they are `geffect/adapter/unlearning_g_effect` and so on.
    - `trackers`: a `Trackers`, by which the trackers that the Trainer reports to get the scores of
      each layer too, and the sheet of the run as an image.
    - `stop`: a `StopWhen`, which ends training at the step that is captured when it fires.
    - `store`, `metadata`, `overwrite`, `on_error`: as those of `Recording`.

    Step s of the file is the one that begins at `state.global_step == s`, from 0; the Trainer logs
    it as s + 1. The objective's gradient is that before clipping, with the factor that clipped it
    beside it in `clip_scale`. A gradient that is not finite leaves a row without objective; where a
    GradScaler skipped its step, `skipped` is set and there is no update either. The loss of the
    objective is not recorded: no event tells it, and the Trainer logs it.

    A Trainer that resumes from a checkpoint continues the file: rows of steps after the checkpoint
    are dropped, since they come again. After training the file is complete; where training raised
    it stays marked as open, is readable, and can be continued.

    A row marks the parameters that the optimizer steps; G-effects sum over these. What moves
    before the next step begins, such as an average that another callback swaps in, is added to
    `update` then; with `update` the gradients stay until then.

    Where a `Rectifier` changes the gradients of the model, `objective` is the gradient before that,
    which costs a copy of it, and what it became, before clipping, is the source `rectified`. The
    averages that the rectifier protects are sources too, as `retain_ema`, and the row tells what it
    did. In update space no gradient is rectified: what it did is seen in `update`.

    When training begins, the callback raises an error for training without gradients to see, an
    optimizer that climbs, a schedule that finds no step in it, probes without labels, and other
    sources than those of the file that it continues.
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
        trackers: Trackers | None = None,
        store: str | StoreOptions = "gram",
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        on_error: OnError = "raise",
        stop: StopWhen | None = None,
    ) -> None:
        check_probes(probes)
        self._path = place_of(path)
        self._probes = dict(probes)
        self._due = every_kth(every) if when is None else when
        self._update, self._log, self._store = update, log, store
        self._metadata, self._overwrite, self._on_error = metadata, overwrite, on_error
        self._stop, self._trackers = stop, trackers
        self._reports: Reports | None = None
        self._recording: Recording | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._step: CapturedStep | None = None
        self._inside = Hooks()  # around an engine's step, which comes before the events of it
        self._ours = False  # the file, begun by an attempt of this training that raised

    def close(self, *, complete: bool = False) -> None:
        """Let go of the file, where training raised and this process is to use it for more."""
        self._ours = False
        self._let_go(complete=complete)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be recorded, and open the file."""
        self._let_go()
        _take_over(self._path)
        trainer, optimizer = firing_loop().trainer, kwargs["optimizer"]
        check_training(trainer, optimizer, self._probes)
        if self._trackers is not None:
            self._reports = Reports(self._trackers, trainer, self._path, self._probes)
        steps = range(state.global_step, state.max_steps)
        due = list(filter(self._due, steps))
        self._recording = self._begun(kwargs["model"], trainer, due, resumed_at=state.global_step)
        self._follow(self._recording, optimizer)
        self._trainer = weakref.ref(trainer)
        with self._let_go_if_it_fails():
            continued = self._check_run(self._recording)
            if not continued:
                check_begins(self._path, steps, due)
        self._ours = self._ours or not continued

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradients of the risks: no gradient of the step is there yet."""
        (last, self._step), recording = (self._step, None), self._opened()
        due = self._due(state.global_step) and not recording.failed
        if last is None and not due:
            return
        optimizer = kwargs["optimizer"]
        if hasattr(optimizer, "train"):  # as the Trainer does next: an evaluation leaves averages
            optimizer.train()
        with self._let_go_if_it_fails():
            if last is not None and last.measured is not None:
                last.amend(self._follower, recording, update=self._update)
        if not due:
            return
        trainer, probes = firing_loop().trainer, {}
        autocast = trainer.compute_loss_context_manager
        with self._let_go_if_it_fails():
            for name, batches in self._probes.items():
                with noting_risk(name):
                    probes[name] = risk_gradient(model_of(trainer), batches, autocast=autocast)
        distributed.show_step(recording.parameters)
        self._step = CapturedStep(
            number=state.global_step,
            epoch=math.nan if state.epoch is None else state.epoch,
            probes=probes,
        )

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the micro-batches; the last one has no event of its own."""
        if self._step is not None:
            self._step.n_micro += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradient of the objective, which has been accumulated, unscaled and clipped."""
        step, recording = self._step, self._opened()
        if step is None:
            return
        loop, optimizer = firing_loop(), kwargs["optimizer"]
        scaler, before = loop.trainer.accelerator.scaler, self._in_engine
        with self._let_go_if_it_fails():
            if not before:
                step.see(self._follower, optimizer, scaler, copy=self._update)
            limit = distributed.norm_limit(recording.parameters, args.max_grad_norm)
            scale = None if before else scale_left(scaler, optimizer)
            step.note_clipping(loop.grad_norm, limit, scale=scale)
            if not self._update:
                step.measure(recording)  # while the gradient is there

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the update, and write the row."""
        step, recording = self._step, self._opened()
        if step is None:
            return
        with self._let_go_if_it_fails():
            if not self._in_engine:
                scaler = firing_loop().trainer.accelerator.scaler
                step.move(self._follower, kwargs["optimizer"], scaler)
            if self._update:
                step.measure(recording)
            with distributed.raise_on_all_ranks():
                entry = step.entry(update=self._update)
                check_sources(self._path, recording.header.sources, entry.sources or ())
                if step.rectifier is not None:
                    recording.header.check_rectifier(step.rectifier)
                recording.write(entry)
                recording.check_open()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the scores of the step to what the Trainer reports to, and stop if that is due."""
        step = self._step
        stop_if_due(self._stop, control)
        if step is None or step.measured is None or OBJECTIVE not in step.measured.names:
            return
        reported = firing_loop().trainer, step.measured, step.stepped, self._opened().table
        if self._log:
            log_scores(*reported)
        if self._reports is not None:
            with self._let_go_if_it_fails():
                self._reports.take(*reported)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the file as complete."""
        self.close(complete=True)

    def hear(self, rectifier: GradientTransform, gradients: Gradients) -> None:
        """Take the gradient of the objective, which a rectifier is about to change."""
        step, recording = self._step, self._recording
        if step is None or recording is None:
            return
        known = set(map(id, gradients.parameters))
        if not known.isdisjoint(map(id, recording.parameters)):
            step.meet(rectifier, gradients, recording.parameters)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Take the gradients that an engine is about to clip, in copies that are ours."""
        if self._step is not None:
            with self._let_go_if_it_fails():
                self._step.see(self._follower, optimizer, None, copy=False)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Take what an engine's step has moved, while gradients tell what that was."""
        if self._step is not None:
            with self._let_go_if_it_fails():
                self._step.move(self._follower, optimizer, None)

    def _begun(
        self, model: nn.Module, trainer: Trainer, due: Sequence[int], *, resumed_at: int
    ) -> Recording:
        """The recording of a training that begins, or goes on at a step."""
        return Recording(
            model,
            self._path,
            metadata=self._metadata,
            store=self._store,
            steps=due,
            existing=IfExists(
                overwrite=(self._overwrite or self._ours) and not resumed_at,
                resume=resumed_at > 0,
                drop_after=resumed_at - 1 if resumed_at else None,
            ),
            on_error=self._on_error,
            provenance={"trainer": _provenance(trainer), **told(trainer)},
        )

    def _follow(self, recording: Recording, optimizer: Any) -> None:
        """Hear of every step from now on."""
        self._follower = StepFollower(recording.parameters, updates=self._update)
        self._in_engine = distributed.is_in_engine(recording.parameters[0])
        _open_callbacks.add(self)
        listeners.add(self)
        if self._in_engine:
            behind = unwrapped(optimizer)
            self._inside.add(behind.register_step_pre_hook, weakly(self._before_step))
            self._inside.add(behind.register_step_post_hook, weakly(self._after_step))

    def _check_run(self, recording: Recording) -> bool:
        """Whether the run goes on with what a file has; refuses one with other sources."""
        ours = [OBJECTIVE, *self._probes, *([UPDATE] if self._update else [])]
        if self._stop is not None:
            self._stop.check_sources(ours)
        recording.watch(self._stop)
        # What a rectifier adds is known when it acts.
        continued = recording.header.sources
        own = [s for s in continued if s != RECTIFIED and not s.endswith(AVERAGE)]
        check_sources(self._path, own, ours)
        return bool(continued)

    def _opened(self) -> Recording:
        if self._recording is None:
            raise RuntimeError(
                "`GEffectCallback` should be told that training begins. Found a step before that. "
                "Add it to the Trainer before `train()`."
            )
        return self._recording

    def _let_go(self, *, complete: bool = False) -> None:
        recording, self._recording, self._step = self._recording, None, None
        self._inside.remove()
        _open_callbacks.discard(self)
        listeners.discard(self)
        if recording is not None:
            recording.close(complete=complete)

    @contextmanager
    def _let_go_if_it_fails(self) -> Iterator[None]:
        # No event tells a callback that training raised, so what it raises itself is all it knows.
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self._let_go()
            raise


def _take_over(path: Path) -> None:
    """Close what was left open here by another callback, of a training that raised."""
    for other in list(_open_callbacks):
        trainer = other._trainer and other._trainer()
        if other._path == path and not (trainer and is_running(trainer)):
            other._let_go()


def _provenance(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    return {
        "class": type(trainer).__name__,
        "max_grad_norm": args.max_grad_norm,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "seed": args.seed,
    }
