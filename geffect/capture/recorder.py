"""The recorder: watches the gradients of a training loop and writes their Gram matrices."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geffect.gradients import (
    Gradients,
    GradientTransform,
    Loss,
    Vector,
    differentiate,
)
from geffect.layers import describe, trainable
from geffect.sources import OBJECTIVE, RETAIN_EMA, UPDATE
from geffect.store.schema import RECTIFICATION_COLUMNS, Row
from geffect.store.writer import RunWriter

from .manifest import as_json, manifest


@dataclass
class _Step:
    """A step whose gradients are taken and whose row is not written yet."""

    number: int
    gradients: Gradients
    measured: tuple[list[str], Tensor] | None  # None while it waits for the update
    rectifier: GradientTransform | None
    declared: Mapping[str, Mapping[str, float] | str]
    lr: float = float("nan")


class Recorder:
    """Writes the gradients of every step into a run file, as Gram matrices a parameter tensor.

    In place of `objective.backward()`, call `recorder.backward(objective=..., forget=...,
    retain=...)`; `.grad` holds the same afterwards, bit for bit, and training ends as it would have
    ended unwatched. A step is written when an optimizer has stepped the model's parameters, else at
    the next `backward` or at `close`; then it is safe from whatever happens to the process.

    - `metadata`: anything that JSON can hold, kept with the run.
    - `update`: also record what the optimizer did, theta after minus theta before, as the source
      `update`. Costs a copy of the parameters and of one gradient.
    - `overwrite` replaces an existing file with the first step, `resume` continues it.

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
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self._model = model
        self._trainable = trainable(model)
        self._parameters = list(self._trainable.values())
        self._metadata = as_json(metadata or {})
        self._update = update
        self._writer = RunWriter(path, describe(model), overwrite=overwrite, resume=resume)
        self._sources: tuple[str, ...] = ()
        self._blocks: tuple[str, ...] = ()
        self._rectifier: Mapping[str, Any] | None = None
        self._optimizer: Mapping[str, Any] | None = None
        self._step: _Step | None = None
        self._losses: Mapping[str, Mapping[str, float] | str] = {}
        self._before: list[Tensor] | None = None
        self._stepped: set[int] = set()  # what optimizers have stepped since the last backward
        self._expected: set[int] = set()  # what they stepped the time before
        self._started = time.perf_counter()
        try:
            self._continue()
        except BaseException:
            self._writer.close(complete=False)
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
        last = self._writer.last_step if self._step is None else self._step.number
        return last + 1

    def backward(self, *, rectifier: GradientTransform | None = None, **losses: Loss) -> None:
        """Take the gradients of the losses of one step, and leave that of `objective` in `.grad`.

        Every loss is a scalar tensor, which costs one backward pass, or a mapping that declares a
        linear combination of others, which costs none: `objective={"forget": -1.0}` is GA,
        `{"forget": -1.0, "retain": 1.0}` is GradDiff. Losses may share a forward. With a rectifier
        `.grad` is the rectified gradient; it has to be empty before then.
        """
        self._writer.check_open()
        self._write()
        self._check(losses, rectifier)
        gradients = differentiate(self._parameters, losses)
        declared = _declared(losses)
        self._check_weights(declared)
        if rectifier is not None:
            rectifier.observe(gradients)
        self._step = step = _Step(self.next_step, gradients, None, rectifier, declared)
        if not self._update:
            step.measured = self._measure(step, None)
        # A copy where the update is to be compared with it: `.grad` may be clipped before then.
        gradients.deposit(copy=self._update)
        if rectifier is not None:
            try:
                rectifier.rectify()
            except BaseException:
                self._step = None
                raise

    def close(self) -> None:
        """Write what is left, and mark the run as complete."""
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        try:
            self._write()
        except BaseException:
            self._writer.close(complete=False)
            raise
        self._writer.close(complete=complete)

    def _continue(self) -> None:
        run = self._writer.resumed
        if run is None:
            return
        if run.metadata != self._metadata:
            raise ValueError(
                f"`metadata` should be that of the run in `{run.path}` to continue it: "
                f"{dict(run.metadata)}. Found {self._metadata}. Pass the same, or record into "
                "another file."
            )
        if self._update != (UPDATE in run.sources):
            raise ValueError(
                f"`update` should be {not self._update} to continue the run in `{run.path}`, as it "
                f"was recorded. Found `update = {self._update}`. Pass the same, or record into "
                "another file."
            )
        self._sources = run.sources
        self._losses = run.manifest["losses"]
        self._rectifier = run.manifest["rectifier"]
        self._blocks = run.rectification()[0] if self._rectifier else ()
        self._started -= float(run.column("wall_seconds")[-1])

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
        self._check_constant(losses, rectifier)

    def _manifest(self, step: _Step) -> dict[str, Any]:
        return manifest(
            self._model,
            losses=step.declared,
            rectifier=None if step.rectifier is None else step.rectifier.options,
            optimizer=self._optimizer,
            metadata=self._metadata,
        )

    def _check_constant(
        self, losses: Mapping[str, Loss], rectifier: GradientTransform | None
    ) -> None:
        if not self._sources:
            return
        names = [*losses, *([] if rectifier is None else rectifier.watched)]
        new = [name for name in names if name not in self._sources]
        if new:
            raise ValueError(
                "The gradients of a step should be among those of the first step of the run: "
                f"{', '.join(self._sources)}. Found {', '.join(new)} as well. Name every loss, and "
                "pass the rectifier, in the first step; or record into another file."
            )
        if rectifier is None:
            return
        options = as_json(rectifier.options)
        if options != self._rectifier or rectifier.blocks != self._blocks:
            raise ValueError(
                f"The rectifier should be set up as in the first step of the run: "
                f"{self._rectifier} for {', '.join(self._blocks)}. Found {options} for "
                f"{', '.join(rectifier.blocks)}. Set it up the same, or record into another file."
            )

    def _check_weights(self, declared: Mapping[str, Mapping[str, float] | str]) -> None:
        for name, weights in declared.items():
            first = self._losses.get(name, weights)
            if weights != first and "loss" not in (weights, first):
                raise ValueError(
                    f"The weights of loss `{name}` should stay those of the first step of the run: "
                    f"{first}. Found {weights}. Declare it the same, or record into another file."
                )

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._step is None or not self._owned(optimizer):
            return
        if self._update and self._before is None:
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        owned = self._owned(optimizer)
        if self._step is None or not owned:
            return
        groups = optimizer.param_groups
        if not self._stepped:
            self._step.lr = float(groups[0]["lr"])
            self._optimizer = {
                "class": type(optimizer).__name__,
                "groups": [
                    {k: v for k, v in group.items() if isinstance(v, int | float | tuple)}
                    for group in groups
                ],
            }
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

    def _measure(self, step: _Step, update: Vector | None) -> tuple[list[str], Tensor]:
        """The names of the gradients that are there, and their Gram matrices."""
        watched = {} if step.rectifier is None else step.rectifier.watched
        # An average of nothing yet is absent, not zero.
        further = {name: v for name, v in watched.items() if any(x is not None for x in v)}
        if update is not None:
            further[UPDATE] = update
        return [*step.gradients.sources, *further], step.gradients.gram(**further)

    def _write(self) -> None:
        step, before, stepped = self._step, self._before, self._stepped
        self._step, self._before, self._stepped = None, None, set()
        if step is None:
            return
        update: Vector | None = None
        if stepped and before is not None:
            # None, which is zero, for what no optimizer has stepped.
            moved = zip(before, self._parameters, strict=True)
            update = [tensor if id(p) in stepped else None for tensor, p in moved]
        self._expected = stepped or self._expected
        names, gram = self._measure(step, update) if step.measured is None else step.measured
        if not self._sources:
            self._name_sources(step)
        self._writer.append(
            Row(
                step=step.number,
                request=0,
                lr=step.lr,
                wall_seconds=time.perf_counter() - self._started,
                losses=self._spread(
                    np.array([*step.gradients.losses.values()]), [*step.gradients.losses]
                ),
                gram=self._spread_gram(gram.numpy(), names),
                rectification=self._report(step.rectifier),
            ),
            sources=self._sources,
            blocks=self._blocks,
            manifest={} if self._writer.count else self._manifest(step),
        )

    def _name_sources(self, step: _Step) -> None:
        self._losses = step.declared
        watched: tuple[str, ...] = ()
        if step.rectifier is not None:
            watched, self._blocks = tuple(step.rectifier.watched), step.rectifier.blocks
            self._rectifier = as_json(step.rectifier.options)
        self._sources = (*step.gradients.sources, *watched, *([UPDATE] if self._update else []))

    def _spread(self, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """The values at the places of their sources, NaN at those of the others."""
        spread = np.full(len(self._sources), np.nan)
        spread[[self._sources.index(name) for name in names]] = values
        return spread

    def _spread_gram(self, gram: np.ndarray, names: Sequence[str]) -> np.ndarray:
        k = len(self._sources)
        places = np.array([self._sources.index(name) for name in names])
        spread = np.full((len(gram), k, k), np.nan)
        spread[:, places[:, None], places] = gram
        return spread

    def _report(self, rectifier: GradientTransform | None) -> np.ndarray | None:
        if not self._blocks:
            return None
        report = None if rectifier is None else rectifier.report
        if report is None:
            return np.full((len(self._blocks), len(RECTIFICATION_COLUMNS)), np.nan)
        return np.array([getattr(report, column) for column in RECTIFICATION_COLUMNS]).T


def _declared(losses: Mapping[str, Loss]) -> dict[str, Mapping[str, float] | str]:
    """The weights of the losses that are combinations; "loss" for those that are tensors."""
    return {
        name: {part: float(weight) for part, weight in loss.items()}
        if isinstance(loss, Mapping)
        else "loss"
        for name, loss in losses.items()
    }
