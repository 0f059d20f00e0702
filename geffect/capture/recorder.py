"""The recorder: watches the gradients of a training loop and writes their Gram matrices."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geffect import distributed
from geffect.gradients import Gradients, GradientTransform, Vector, separate, stream
from geffect.layers import trainable
from geffect.losses import Loss, Passes, declared, of_objective, plan
from geffect.objectives import statistics
from geffect.sources import OBJECTIVE, RETAIN_EMA, UPDATE

from .collector import Measured
from .keep import Keep
from .known import Declared
from .manifest import described
from .recording import OnError, Recording
from .schedule import EACH, Schedule


@dataclass
class _Window:
    """The micro-batches of one step, as far as they have come."""

    micro: int = 0
    gradients: Gradients | None = None
    weights: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Count a micro-batch."""
        self.micro += 1
        for name, values in weights.items():
            self.weights.setdefault(name, []).append(values.detach().flatten())

    def statistics(self) -> dict[str, Sequence[float]]:
        return {name: statistics(torch.cat(parts)) for name, parts in self.weights.items()}


@dataclass
class _Step:
    """A step whose gradients are taken and whose row is not written yet."""

    number: int
    declared: Declared
    rectifier: GradientTransform | None
    n_micro: int
    weights: Mapping[str, Sequence[float]]
    gradients: Gradients | None  # while they wait for the update
    measured: Measured | None
    lr: float = float("nan")


class Recorder:
    """Writes the gradients of every step into a run file, as Gram matrices a parameter tensor.

    In place of `objective.backward()`, call `recorder.backward(objective=..., forget=...,
    retain=...)`; `.grad` holds the same afterwards, bit for bit, and training ends as it would have
    ended unwatched. A step is written when an optimizer has stepped the model's parameters, else at
    the next `backward` or at `close`; then it is safe from whatever happens to the process.

    - `metadata`: anything that JSON can hold, kept with the run.
    - `update`: also record what the optimizer did, theta after minus theta before, as the source
      `update`. Costs a copy of the parameters, and the gradients stay until then. Without it, and
      without a rectifier, inner products are taken inside of the last backward pass: two losses
      need no more memory than one, and each further loss that of one gradient.
    - `when`: the steps to capture, such as `every(5)`; at the others only the objective is
      differentiated. `due` tells whether the losses of the next step are needed.
    - `store`: what is kept beside the Gram matrices: "sketch", "int8", "int4", "bf16", "full", or a
      `Keep`. `steps`: how many steps training has, if known; the size of the file is then told at
      the start, and a run that would not fit the disk is refused.
    - `overwrite` replaces an existing file with the first step, `resume` continues it, and
      `drop_after` gives up the steps after the one that training resumes from.
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
        update: bool = False,
        when: Schedule = EACH,
        store: str | Keep = "gram",
        steps: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
        drop_after: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
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
            drop_after=drop_after,
            on_error=on_error,
        )
        self._parameters = self._recording.parameters
        self._next = self._recording.next_step
        self._window = _Window()
        self._step: _Step | None = None
        self._before: list[Tensor] | None = None
        self._optimizer: Mapping[str, Any] | None = None
        self._stepped: set[int] = set()  # what optimizers have stepped since the last backward
        self._expected: set[int] = set()  # what they stepped the time before
        try:
            self._check_continued(resume)
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
        """
        self._write()
        with distributed.together():
            self._recording.check_open()
            self._check(losses, rectifier)
            if rectifier is None and not self.due:
                losses = of_objective(losses)
            passes = plan(self._parameters, losses)
            of_step = declared(losses)
            self._recording.known.check_declared(of_step)
            self._recording.known.check_weights(weights or ())
            distributed.check_unsynchronised(self._model)
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, _Window()
        window.add(weights or {})
        measured = None
        if self._streams(passes, window, needed_later=rectifier is not None or accumulate):
            measured = self._stream(passes)
        else:
            self._extend(window, passes, rectifier, accumulate)
        if accumulate:
            self._window = window
            return
        step = _Step(
            number=self._next,
            declared=of_step,
            rectifier=rectifier,
            n_micro=window.micro,
            weights=window.statistics(),
            gradients=window.gradients,
            measured=measured,
        )
        if self.due:
            if measured is None and not self._update:
                self._measure(step, None)
            self._step = step
        self._next += 1
        if rectifier is not None:
            assert window.gradients is not None
            window.gradients.deposit(copy=self._update)
            try:
                rectifier.rectify()
            except BaseException:
                self._step = None
                raise

    def keep(self, name: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
        """Keep a table with the run, such as the effects of samples or tokens.

        Columns hold numbers or text; `Run.table(name)` gives them back.
        """
        self._recording.keep(name, columns)

    def close(self) -> None:
        """Write what is left, and mark the run as complete."""
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        try:
            # After an error the other processes may never come to the step that waits here.
            if complete or distributed.process_count() == 1:
                self._write()
        except BaseException:
            self._recording.close(complete=False)
            raise
        self._recording.close(complete=complete)

    def _streams(self, passes: Passes, window: _Window, *, needed_later: bool) -> bool:
        """Whether inner products can be taken inside of the last pass, and gradients let go."""
        return (
            self.due
            and not (needed_later or self._update)
            and window.micro == 1
            and passes.accumulates_once
            and not distributed.averages(self._model)
        )

    def _stream(self, passes: Passes) -> Measured:
        collector = self._recording.collector(self._next, passes.weights)
        with distributed.gradient_sync(self._model):
            stream(self._parameters, passes, collector.take)
        return collector.measured(_over_processes(passes.losses))

    def _extend(
        self,
        window: _Window,
        passes: Passes,
        rectifier: GradientTransform | None,
        accumulate: bool,
    ) -> None:
        """Add a micro-batch to the window, and to `.grad` unless a rectifier comes first."""
        with distributed.gradient_sync(self._model):
            gradients = separate(self._parameters, passes)
        if distributed.averages(self._model):
            vectors = distributed.average(self._parameters, gradients.vectors)
            gradients = replace(gradients, vectors=vectors)
        window.gradients = gradients if window.gradients is None else window.gradients + gradients
        if rectifier is None:
            # A copy where it is looked at again: `.grad` may be added to, or clipped, before then.
            gradients.deposit(copy=self._update or accumulate)
        elif not accumulate:
            rectifier.observe(window.gradients)

    def _check_continued(self, resume: bool) -> None:
        sources = self._recording.known.sources
        if resume and sources and self._update != (UPDATE in sources):
            raise ValueError(
                f"`update` should be {not self._update} to continue the run in "
                f"`{self._recording.path}`, as it was recorded. Found `update = {self._update}`. "
                "Pass the same, or record into another file."
            )

    def _check(self, losses: Mapping[str, Loss], rectifier: GradientTransform | None) -> None:
        reserved = [name for name in losses if name in (UPDATE, RETAIN_EMA) or "/" in name]
        if OBJECTIVE not in losses or reserved:
            raise ValueError(
                f"The losses should have one named `{OBJECTIVE}`, none named `{UPDATE}` or "
                f"`{RETAIN_EMA}`, and no name with a slash. Found {', '.join(losses) or 'none'}. "
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
        known = self._recording.known
        known.check_sources([*losses, *([] if rectifier is None else rectifier.watched)])
        if rectifier is not None:
            known.check_rectifier(rectifier)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._step is None or not self._owned(optimizer):
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
        assert step.gradients is not None
        vectors = {
            name: vector[: len(self._parameters)] for name, vector in step.gradients.vectors.items()
        }
        watched = {} if step.rectifier is None else step.rectifier.watched
        # An average of nothing yet is absent, not zero.
        further = {name: v for name, v in watched.items() if any(x is not None for x in v)}
        if update is not None:
            further[UPDATE] = update
        step.measured = self._recording.measure(
            step.number,
            {**vectors, **further},
            _over_processes(step.gradients.losses),
            {**step.gradients.weights, **{name: {name: 1.0} for name in further}},
        )
        step.gradients = None

    def _write(self) -> None:
        step, before, stepped = self._step, self._before, self._stepped
        self._step, self._before, self._stepped = None, None, set()
        if step is None:
            return
        self._expected = stepped or self._expected
        if step.measured is None:
            update: Vector | None = None
            if stepped and before is not None:
                # None, which is zero, for what no optimizer has stepped.
                moved = zip(before, self._parameters, strict=True)
                update = [tensor if id(p) in stepped else None for tensor, p in moved]
            self._measure(step, update)
        assert step.measured is not None
        watched = () if step.rectifier is None else tuple(step.rectifier.watched)
        self._recording.write(
            step.number,
            step.measured,
            declared=step.declared,
            lr=step.lr,
            n_micro=step.n_micro,
            clip_scale=float("nan"),  # whether the loop clips is not seen
            rectifier=step.rectifier,
            optimizer=self._optimizer,
            weights=step.weights,
            watched=(*watched, *([UPDATE] if self._update else [])),
        )


def _over_processes(losses: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(losses, distributed.mean([*losses.values()]), strict=True))
