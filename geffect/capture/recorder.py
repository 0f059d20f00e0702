"""The recorder: watches the gradients of a training loop and writes their Gram matrices."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self
from weakref import finalize

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.forwards import check_no_loss_asked
from geffect.gradients import AtCopy, Gradients, GradientTransform, of_all_ranks
from geffect.hooks import AFTER_STEPS, BEFORE_STEPS, Hooks, weakly
from geffect.layers import trainable
from geffect.losses import (
    Loss,
    check_reached,
    declared,
    loss_scale,
    of_objective,
    plan,
)
from geffect.objectives import Objective, as_objective
from geffect.optimizers import check_descends

from .guard import OnError
from .implicit_weights import ImplicitWeights, asked_with
from .pending_row import PendingRow
from .recording import IfExists, Recording
from .schedule import EACH, Schedule
from .stopping import StopWhen
from .store_options import StoreOptions
from .window import Watched, Window, protected


class Recorder:
    """Writes the gradients of every step into a run file, as Gram matrices a parameter tensor.

    In place of `objective.backward()`, call `recorder.backward(objective=..., forget=...,
    retain=...)`; `.grad` holds the same afterwards, bit for bit, and training ends as it would have
    ended unwatched. An objective declared as a sum of losses is the same up to rounding.

    - `metadata`: anything that JSON can hold, kept with the run.
    - `objective`: what is minimised, for the file to keep its name, options and reduction: an
      `Objective`, a name of the catalogue, or weights of risks.
    - `update`: also record theta at the next gradient, or at `close`, minus theta at this one, as
      the source `update`. Costs a copy of the parameters; that and the gradients stay until the
      next `backward`. Without it, and without a rectifier, two losses need no more memory than one,
      and each further loss that of one gradient.
    - `when`: the steps to capture, such as `geffect.capture.every(5)`; at the others only the
      objective is differentiated. `due` tells whether the losses of the next step are needed.
    - `store`: what is kept beside the Gram matrices: "sketch", "int8", "int4", "bf16", "full", or a
      `geffect.capture.StoreOptions`.
    - `steps`: how many steps training has, if known. The size of the file is then told at the
      start, and a run that would not fit the disk is refused.
    - `overwrite`: replaces an existing run file with the first step; no other file.
    - `resume`: continues an existing file.
    - `next_step`: the number of the step that comes first, where training goes on from a
      checkpoint. Steps of the file from there on are given up, since they come again.
    - `on_error`: "raise" ends training when the file cannot be written, "warn" says so once.
    - `stop`: a `StopWhen`, a rule that looks at each row and says when training may end.

    A step lasts from one gradient to the next. What it moves is followed whatever moves it: an
    optimizer, with or without a closure, a second one, a wrapper, or the loop by hand. The row says
    which parameters that were; where nothing is seen to move, all count. A row is written, and then
    safe, as soon as optimizers have stepped everything that has a gradient, or what they stepped
    the time before, and else at the next `backward` or at `close`. What moves after that is added
    to it. An optimizer that climbs is refused.

    Under `torch.distributed` every rank has a recorder, and rank 0 writes. Losses under DDP that
    are tensors are computed inside of `with model.no_sync():`; FSDP2 and DeepSpeed need nothing.

    >>> import tempfile, geffect
    >>> model = nn.Linear(2, 1)
    >>> path = tempfile.mkdtemp() + "/run.h5"
    >>> with Recorder(model, path) as recorder:
    ...     recorder.backward(objective={"forget": -1.0}, forget=lambda: model(torch.ones(2)).sum())
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
        stop: StopWhen | None = None,
    ) -> None:
        if resume and next_step is None:
            _check_captures_all(when)
        self._hooks = Hooks()  # what is copied is told of these before it comes to the file
        self._when, self.stop = when, stop
        self._recording = Recording(
            model,
            path,
            metadata=metadata,
            store=store,
            steps=None if steps is None else list(filter(when, range(steps))),
            existing=IfExists(
                overwrite, resume, next_step - 1 if resume and next_step is not None else None
            ),
            on_error=on_error,
        )
        self._watched = Watched(model, self._recording, update, trainable(model))
        self._agreement = distributed.Agreement(early=self._recording.guard.may_give_up)
        self._next = self._recording.next_step if next_step is None else next_step
        self._window: Window | None = None  # whose last micro-batch has not come yet
        self._pending = PendingRow(self._recording.parameters, updates=update)
        with ExitStack() as undone:
            undone.callback(self._recording.close, complete=False)
            self._recording.watch(stop)
            if resume:
                self._watched.check_continued()
            if objective is not None:
                self.note_objective(objective)
            # Hooks that all optimizers share: the user's one is neither wrapped nor asked for.
            finalize(self, self._hooks.remove)
            undone.callback(self._hooks.remove)
            self._hooks.add(BEFORE_STEPS.register, weakly(self._before_step))
            self._hooks.add(AFTER_STEPS.register, weakly(self._after_step), first=True)
            undone.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self._recording.is_here:
            return  # the run is that of the process that this one was forked from
        try:
            self._end(complete=error is None)
        except Exception as further:
            if error is None:
                raise
            error.add_note(f"The recorder found beside that: {further}")

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
        weights: ImplicitWeights | None = None,
        accumulate: bool = False,
        scaler: GradScaler | None = None,
        relearned: AtCopy | None = None,
        **losses: Loss,
    ) -> None:
        """Take the gradients of the losses of one step, and leave that of `objective` in `.grad`.

        Every loss is a function without arguments that returns a scalar tensor, or such a tensor,
        and costs one backward pass; or a mapping that declares a linear combination of others,
        which costs none: `{"forget": -1.0}` is GA, `{"forget": -1.0, "retain": 1.0}` is GradDiff. A
        function is called right before its pass, and its graph is gone before the next: those of
        the objective first, then the others, which leave no trace in model and random numbers.
        Losses may share a forward (`SharedForward`). `.grad` has to be empty where an optimizer
        steps by it, so that a row tells of all of that; a rectifier leaves its own there.

        - `weights`: the implicit weights of an objective by name, of answer tokens or samples, or a
          function that returns them; mean, median, 95th percentile and maximum are recorded.
        - `accumulate`: True for all but the last micro-batch of a step. The window is one row, of
          the gradients and losses summed over it.
        - `scaler`: multiplies what goes into `.grad`, and nothing in the record; pass the losses as
          they are, and call `scaler.step(optimizer)` as always. A step whose scaled gradients are
          not finite is marked as skipped.
        - `relearned`: a `geffect.Relearned`, where the gradient of the objective is taken alone.
        """
        self._meet_gradient()
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, None
        model, parameters = self._watched.model, self._watched.parameters
        with self._agreement.step(parameters, early=relearned is not None) as step:
            step.told_after(self._recording.check_open)
            self._watched.check(losses, rectifier)
            place = relearned.elsewhere(model, losses, scaler) if relearned else None
            if rectifier is None and not self.due:
                losses = of_objective(losses)
            header, due = self._recording.header, self.due
            losses, found = asked_with(
                model, losses, weights if due else None, header.check_weights
            )
            passes = plan(
                parameters,
                losses,
                scale=loss_scale(scaler, parameters[0].device),
                model=model,
                protected=protected(losses, rectifier),
                elsewhere=place,
                told_later=step.later,
            )
            check_reached(passes, parameters)
            of_step = header.hold(declared(losses), relearned)
            if passes.order.tensors:
                distributed.check_unsynchronised(model)
            distributed.begin_micro_batch(parameters, first=window is None, accumulate=accumulate)
            if due:
                sources = self._watched.sources(of_step, rectifier)
                step.told_after(partial(self._recording.announce, sources))
            step.check_same_on_ranks(
                [*of_step.items()], [*passes.order.tensors], sorted(found), accumulate, due
            )
            self._recording.guard.agree()
            if window is None or not window.goes_on(last=not accumulate, check=step.told_after):
                window = Window(self._watched, self._next, self.due, of_step, rectifier)
            window.add(passes, found, last=not accumulate, settle=step.settle)
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
        relearned: AtCopy | None = None,
    ) -> None:
        """Record gradients of one step that were taken by other means, and leave the objective's.

        As `backward`, once they are summed over `n_micro` micro-batches and all processes' mean.
        """
        self._meet_gradient()
        with self._agreement.step(()) as step:
            self._recording.check_open()
            self._watched.check(gradients.declared, rectifier)
            of_step = self._recording.header.hold(gradients.declared, relearned)
            if due := self.due:
                self._recording.announce(self._watched.sources(of_step, rectifier))
            step.check_same_on_ranks([*of_step.items()], due)
            self._recording.guard.agree()
            everywhere, _ = of_all_ranks(lambda: gradients, step.settle)
        window = Window(self._watched, self._next, self.due, of_step, rectifier)
        window.take(everywhere, n_micro)
        self._finish(window)

    def note_objective(
        self, objective: Objective | Mapping[str, float] | str, *, reference: str | None = None
    ) -> None:
        """Keep the objective and what it has of the run in the file, before its first step.

        `reference` tells in words where the model is from that it compares with.
        """
        self._recording.note_objective(as_objective(objective), reference)

    def keep_table(self, name: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
        """Keep a table with the run, such as the effects of samples or tokens.

        Columns hold numbers or text; `Run.table(name)` gives them back.
        """
        self._recording.keep_table(name, columns)

    def close(self) -> None:
        """Write what is left, and mark the run as complete."""
        self._recording.check_here()
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        self._hooks.remove()
        try:
            if complete:
                self._end_window()
            # After an error other processes may never come to the step that waits here, and an
            # optimizer may have come to a part of its own.
            if complete or (distributed.world_size() == 1 and not self._pending.inside):
                self._pending.write(at_gradient=False)
        except BaseException:
            self._recording.close(complete=False)
            raise
        self._recording.close(complete=complete)

    def _finish(self, window: Window) -> None:
        """The window is a step, which moves the parameters until the next gradient."""
        self._next += 1
        window.finish()
        if window.captured:
            self._pending.begin(window)

    def _end_window(self) -> None:
        """End a window whose last micro-batch was not said to be the last."""
        window, self._window = self._window, None
        if window is None:
            return
        window.check_may_end()
        if not window.is_given_up:
            self._finish(window)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._pending.owns(optimizer) or not self._recording.is_here:
            return
        check_no_loss_asked()
        try:
            check_descends(optimizer)
            self._end_window()
        except BaseException:
            self._window = None
            self._pending.end()  # of a step that is none of ours
            raise
        self._pending.enter(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._pending.owns(optimizer) or not self._recording.is_here:
            return
        window, self._window = self._window, None
        if window is not None:
            raise RuntimeError(
                "The last micro-batch of a step should be passed with accumulate=False in the "
                "closure of an optimizer. Found accumulate=True for all of them. Tell the last one."
            )
        self._pending.leave(optimizer)

    def _meet_gradient(self) -> None:
        """The next gradient is about to be taken: the step before has moved what it moves."""
        check_no_loss_asked()
        self._recording.check_here()
        self._pending.write(at_gradient=True)
        self._pending.end()


def _check_captures_all(when: Schedule) -> None:
    """Refuse to continue a run by its file alone where that does not have every step."""
    if when is not EACH:
        raise ValueError(
            "`next_step` should be given to continue a run that captures some steps only: the file "
            "does not tell which one training goes on with. Found None. Pass the number of steps "
            "that the checkpoint has behind it."
        )
