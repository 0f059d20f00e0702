"""The recorder: watches the gradients of a training loop and writes their Gram matrices."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geffect import distributed
from geffect.gradients import Gradients, GradientTransform, Vector, reduced, stream
from geffect.layers import trainable
from geffect.losses import (
    Loss,
    Passes,
    check_no_step_inside,
    declared,
    loss_scale,
    of_objective,
    plan,
)
from geffect.objectives import Objective, as_objective, provenance, statistics
from geffect.sources import AVERAGE, OBJECTIVE, UPDATE, is_reserved

from .collector import Measurement
from .header import Declared
from .manifest import described
from .recording import OnError, Recording
from .schedule import EACH, Schedule
from .store_options import StoreOptions


@dataclass
class _Window:
    """The micro-batches of one step, as far as they have come."""

    declared: Declared
    rectifier: GradientTransform | None
    micro: int = 0
    gradients: Gradients | None = None
    scaled: bool = False
    measured: Measurement | None = (
        None  # of a window of one, where nothing needs its gradients later
    )
    weights: dict[str, list[Tensor]] = field(default_factory=dict)

    def statistics(self) -> dict[str, Sequence[float]]:
        return {name: statistics(torch.cat(parts)) for name, parts in self.weights.items()}


@dataclass
class _Step:
    """A step whose gradients are taken and whose row is not written yet."""

    number: int
    window: _Window
    lr: float = float("nan")


class Recorder:
    """Writes the gradients of every step into a run file, as Gram matrices a parameter tensor.

    In place of `objective.backward()`, call `recorder.backward(objective=..., forget=...,
    retain=...)`; `.grad` holds the same afterwards, bit for bit, and training ends as it would have
    ended unwatched. (An objective declared as a sum of several losses is the same up to rounding:
    their gradients are taken apart and added.) A step is written when an optimizer has stepped the
    model's parameters, else at the next `backward` or at `close`; then it is safe from whatever
    happens to the process.

    - `metadata`: anything that JSON can hold, kept with the run.
    - `objective`: what is minimised, for the file to keep its name, options and reduction: an
      `Objective`, a name of the catalogue, or weights of risks.
    - `update`: also record what the optimizer did, theta after minus theta before, as the source
      `update`. Costs a copy of the parameters, and the gradients stay until then. Without it, and
      without a rectifier, inner products are taken inside of the last backward pass: two losses
      need no more memory than one, and each further loss that of one gradient.
    - `when`: the steps to capture, such as `geffect.capture.every(5)`; at the others only the
      objective is differentiated. `due` tells whether the losses of the next step are needed.
    - `store`: what is kept beside the Gram matrices: "sketch", "int8", "int4", "bf16", "full", or a
      `geffect.capture.StoreOptions`. `steps`: how many steps training has, if known; the size of
      the file is then told at the start, and a run that would not fit the disk is refused.
    - `overwrite` replaces an existing file with the first step, `resume` continues it. `next_step`
      is the number of the step that comes first, where training goes on from a checkpoint: steps of
      the file from there on are given up, since they come again.
    - `on_error`: "raise" ends training when the file cannot be written, "warn" says so once.

    Under `torch.distributed` every rank has a recorder, and rank 0 writes. The losses of a model in
    `DistributedDataParallel` are computed inside of `with model.no_sync():`; their gradients are
    averaged over the ranks here. Sharded models (FSDP2) need nothing.

    >>> import tempfile, geffect
    >>> model = nn.Linear(2, 1)
    >>> path = tempfile.mkdtemp() + "/run.h5"
    >>> with Recorder(model, path) as recorder:
    ...     recorder.backward(objective={"forget": -1.0}, forget=model(torch.ones(2)).sum())
    >>> geffect.open_run(path).sources
    ('objective', 'forget')
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        objective: Objective | Mapping[str, float] | str | None = None,
        update: bool = False,
        when: Schedule = EACH,
        store: str | StoreOptions = "gram",
        steps: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
        next_step: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if resume and next_step is None and when is not EACH:
            raise ValueError(
                "`next_step` should be given to continue a run of which not every step is "
                "captured: the file does not tell which one training goes on with. Found None. "
                "Pass the number of steps that the checkpoint has behind it."
            )
        self._model = model
        self._trainable = trainable(model)
        self._update = update
        self._when = when
        self._recording = Recording(
            model,
            path,
            metadata=metadata,
            store=store,
            steps=None if steps is None else list(filter(when, range(steps))),
            overwrite=overwrite,
            resume=resume,
            drop_after=None if next_step is None or not resume else next_step - 1,
            on_error=on_error,
        )
        self._parameters = self._recording.parameters
        self._next = self._recording.next_step if next_step is None else next_step
        self._window: _Window | None = None
        self._step: _Step | None = None
        self._before: list[Tensor] | None = None
        self._optimizer: Mapping[str, Any] | None = None
        self._stepped: set[int] = set()  # what optimizers have stepped since the last backward
        self._expected: set[int] = set()  # what they stepped the time before
        try:
            self._check_continued(resume)
            if objective is not None:
                self.note_objective(objective)
        except BaseException:
            self._recording.close(complete=False)
            raise
        # Hooks that all optimizers share: the user's optimizer is neither wrapped nor asked for.
        self._hooks = (
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(complete=kind is None)

    @property
    def next_step(self) -> int:
        """The number that the next step gets."""
        return self._next

    @property
    def due(self) -> bool:
        """Whether the next step is captured; its risks need not be computed if it is not."""
        return self._when(self._next) and not self._recording.failed

    def backward(
        self,
        *,
        rectifier: GradientTransform | None = None,
        weights: Mapping[str, Tensor] | None = None,
        accumulate: bool = False,
        scaler: GradScaler | None = None,
        **losses: Loss,
    ) -> None:
        """Take the gradients of the losses of one step, and leave that of `objective` in `.grad`.

        Every loss is a scalar tensor, which costs one backward pass, or a mapping that declares a
        linear combination of others, which costs none: `objective={"forget": -1.0}` is GA,
        `{"forget": -1.0, "retain": 1.0}` is GradDiff. Losses may share a forward. With a rectifier
        `.grad` is the rectified gradient; it has to be empty before then.

        - `weights`: the implicit weights of an objective by name, of answer tokens or samples;
          mean, median, 95th percentile and maximum are recorded.
        - `accumulate`: True for all but the last micro-batch of a step. The window is one row, of
          the gradients and losses summed over it.
        - `scaler`: multiplies what goes into `.grad`, and nothing in the record; pass the losses as
          they are, and call `scaler.step(optimizer)` as always. A step whose scaled gradients are
          not finite is marked as skipped.
        """
        self._write()
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, None
        with distributed.raise_on_all_ranks() as ranks:
            self._recording.check_open()
            self._check(losses, rectifier)
            if rectifier is None and not self.due:
                losses = of_objective(losses)
            passes = plan(
                self._parameters, losses, scale=loss_scale(scaler, self._parameters[0].device)
            )
            of_step = declared(losses)
            self._recording.header.check_declared(of_step)
            self._recording.header.check_weights(weights or ())
            distributed.check_unsynchronised(self._model)
            if self.due:
                self._recording.announce(self._sources(of_step, rectifier))
            ranks.check_same_on_ranks(
                [*of_step.items()], sorted(weights or ()), accumulate, self.due
            )
        window = window or _Window(of_step, rectifier)
        window.micro += 1
        window.scaled = passes.scale != 1.0
        for name, values in (weights or {}).items():
            window.weights.setdefault(name, []).append(values.detach().flatten())
        if self._streams(passes, window, accumulate):
            window.measured = self._stream(passes)
        else:
            self._extend(window, passes, accumulate)
        if accumulate:
            self._window = window
        else:
            self._finish(window)

    def record(
        self,
        gradients: Gradients,
        *,
        rectifier: GradientTransform | None = None,
        n_micro: int = 1,
    ) -> None:
        """Record gradients of one step that were taken by other means, and leave the objective's.

        As `backward`, from where the gradients are there: summed over `n_micro` micro-batches, and
        averaged over the processes.
        """
        self._write()
        of_step = gradients.declared
        with distributed.raise_on_all_ranks() as ranks:
            self._recording.check_open()
            self._check(of_step, rectifier)
            self._recording.header.check_declared(of_step)
            if self.due:
                self._recording.announce(self._sources(of_step, rectifier))
            ranks.check_same_on_ranks([*of_step.items()], self.due)
        window = _Window(
            of_step, rectifier, micro=n_micro, gradients=gradients, scaled=gradients.scale != 1.0
        )
        if rectifier is None:
            gradients.deposit(copy=self.due and self._update)
        else:
            rectifier.observe(gradients)
        self._finish(window)

    def note_objective(
        self, objective: Objective | Mapping[str, float] | str, *, reference: str | None = None
    ) -> None:
        """Keep name, options and reduction of the objective with the run, before its first step.

        `reference` tells in words where the model is from that it compares with.
        """
        self._recording.note_objective(provenance(as_objective(objective), reference))

    def keep_table(self, name: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
        """Keep a table with the run, such as the effects of samples or tokens.

        Columns hold numbers or text; `Run.table(name)` gives them back.
        """
        self._recording.keep_table(name, columns)

    def close(self) -> None:
        """Write what is left, and mark the run as complete."""
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        try:
            # After an error the other processes may never come to the step that waits here.
            if complete or distributed.world_size() == 1:
                self._end_window()
                self._write()
        except BaseException:
            self._recording.close(complete=False)
            raise
        self._recording.close(complete=complete)

    def _finish(self, window: _Window) -> None:
        """The window is a step: rectify it, and keep what its row needs until it is written."""
        step, rectifier = _Step(self._next, window), window.rectifier
        if self.due:
            if window.measured is None and not self._update:
                self._measure(step, None)
            self._step = step
        self._next += 1
        if rectifier is not None:
            assert window.gradients is not None
            try:
                rectifier.rectify(window.gradients, copy=self._update)
                if not self._update:
                    window.gradients = None
            except BaseException:
                self._step = None
                raise

    def _end_window(self) -> None:
        """End a window of which nobody said that its last micro-batch was the last."""
        window, self._window = self._window, None
        if window is None:
            return
        if window.rectifier is not None:
            raise RuntimeError(
                "The last micro-batch of a step should be passed with accumulate=False, for its "
                f"gradient to be rectified. Found the end of the step after {window.micro} "
                "micro-batches with accumulate=True. Tell the last one, also of a partial window."
            )
        self._finish(window)

    def _streams(self, passes: Passes, window: _Window, accumulate: bool) -> bool:
        """Whether inner products can be taken inside of the last pass, and gradients let go."""
        needed_later = self._update or accumulate or window.micro > 1
        return (
            self.due
            and window.rectifier is None
            and not needed_later
            and passes.accumulates_once
            and not distributed.averages(self._model)
        )

    def _stream(self, passes: Passes) -> Measurement:
        collector = self._recording.collector(self._next, passes.weights)
        with distributed.gradient_sync(self._model):
            stream(self._parameters, passes, collector.take)
        return collector.measured(_over_processes(passes.losses))

    def _extend(self, window: _Window, passes: Passes, accumulate: bool) -> None:
        """Add a micro-batch to the window, and to `.grad` unless a rectifier comes first."""
        gradients = reduced(self._model, self._parameters, passes)
        if window.rectifier is None:
            # A copy where it is looked at again: `.grad` may be added to, or clipped, before then.
            gradients.deposit(copy=self.due and (self._update or accumulate or window.micro > 1))
            if not self.due:
                return
        if window.gradients is None:
            window.gradients = gradients
        else:
            window.gradients.add_(gradients)
        if window.rectifier is not None and not accumulate:
            window.rectifier.observe(window.gradients)

    def _sources(self, of_step: Declared, rectifier: GradientTransform | None) -> list[str]:
        watched = () if rectifier is None else rectifier.watched
        return [*of_step, *watched, *([UPDATE] if self._update else [])]

    def _check_continued(self, resume: bool) -> None:
        sources = self._recording.header.sources
        if resume and sources and self._update != (UPDATE in sources):
            raise ValueError(
                f"`update` should be {not self._update} to continue the run in "
                f"`{self._recording.path}`, as it was recorded. Found `update = {self._update}`. "
                "Pass the same, or record into another file."
            )

    def _check(self, losses: Collection[str], rectifier: GradientTransform | None) -> None:
        reserved = [name for name in losses if is_reserved(name) or "/" in name]
        if OBJECTIVE not in losses or reserved:
            raise ValueError(
                f"The losses should have one named `{OBJECTIVE}`, none named `{UPDATE}` or ending "
                f"in `{AVERAGE}`, and no name with a slash. Found {', '.join(losses) or 'none'}. "
                'Pass objective=loss, or weights such as objective={"forget": -1.0}.'
            )
        then, now = self._trainable, trainable(self._model)
        changed = sorted(n for n in then.keys() | now.keys() if then.get(n) is not now.get(n))
        if changed:
            raise ValueError(
                "The parameters that require a gradient should stay those of the first step. Found "
                f"{len(changed)} frozen, added or replaced, the first of them {changed[:3]}. "
                "Record what follows into another file, with a new Recorder."
            )
        check_no_step_inside(self._parameters)
        known = self._recording.header
        known.check_sources([*losses, *([] if rectifier is None else rectifier.watched)])
        if rectifier is not None:
            known.check_rectifier(rectifier)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if (self._step is None and self._window is None) or not self._owned(optimizer):
            return
        self._end_window()
        if self._step is None:
            return
        if self._update and self._before is None:
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        owned = self._owned(optimizer)
        if self._step is None or not owned:
            return
        if not self._stepped:
            self._step.lr = float(optimizer.param_groups[0]["lr"])
            self._optimizer = described(optimizer)
        moved = owned - self._stepped
        if self._before is not None:
            # In place: what was the copy of the old parameters becomes the update.
            with torch.no_grad():
                for before, parameter in zip(self._before, self._parameters, strict=True):
                    if id(parameter) in moved:
                        before.neg_().add_(parameter)
        self._stepped |= owned
        # Several optimizers may share the model. Who stepped last time tells when all have; the
        # first time, that everything with a gradient has been stepped.
        wanted = self._expected or {id(p) for p in self._parameters if p.grad is not None}
        if wanted <= self._stepped:
            self._write()

    def _owned(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Which of the recorded parameters an optimizer steps, by their ids."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return stepped.intersection(map(id, self._parameters))

    def _measure(self, step: _Step, update: Vector | None) -> None:
        gradients, rectifier = step.window.gradients, step.window.rectifier
        assert gradients is not None
        count = len(self._parameters)
        vectors = {name: vector[:count] for name, vector in gradients.vectors.items()}
        watched = {} if rectifier is None else rectifier.watched
        # An average of nothing yet is absent, not zero.
        further = {name: v for name, v in watched.items() if any(x is not None for x in v)}
        if update is not None:
            further[UPDATE] = update
        step.window.measured = self._recording.measure(
            step.number,
            {**vectors, **further},
            _over_processes(gradients.losses),
            {**gradients.weights, **{name: {name: 1.0} for name in further}},
        )
        if rectifier is None:
            step.window.gradients = None

    def _write(self) -> None:
        step, before, stepped = self._step, self._before, self._stepped
        self._step, self._before, self._stepped = None, None, set()
        if step is None:
            return
        self._expected |= stepped
        window = step.window
        if window.measured is None:
            update: Vector | None = None
            if stepped and before is not None:
                # None, which is zero, for what no optimizer has stepped.
                moved = zip(before, self._parameters, strict=True)
                update = [tensor if id(p) in stepped else None for tensor, p in moved]
            self._measure(step, update)
        assert window.measured is not None
        self._recording.write(
            step.number,
            window.measured,
            declared=window.declared,
            lr=step.lr,
            n_micro=window.micro,
            clip_scale=float("nan"),  # whether the loop clips is not seen
            skipped=window.scaled and not bool(window.measured.gram.isfinite().all()),
            rectifier=window.rectifier,
            optimizer=self._optimizer,
            weights=window.statistics(),
            sources=self._sources(window.declared, window.rectifier),
        )


def _over_processes(losses: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(losses, distributed.mean([*losses.values()]), strict=True))
