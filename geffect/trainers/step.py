"""A captured step: what the events of a Trainer tell of it, from its first to the row of a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from geffect import distributed, gram
from geffect.capture.collector import Measurement
from geffect.capture.recording import Recording
from geffect.capture.rows import Entry
from geffect.capture.window import sources_of
from geffect.gradients import Gradients, GradientTransform, Vector
from geffect.optimizers import check_descends, described, rate_of, unwrapped
from geffect.risk import RiskGradient
from geffect.sources import OBJECTIVE, RECTIFIED, UPDATE
from geffect.steps import Move, StepFollower

from .loop import INSTEAD, clip_scale, current_scale

SEEN = "seen"
"""The gradient as the optimizer sees it; a multiple of the objective's, or of the rectified one."""

CULPRITS = (
    "another callback, or an optimizer that steps inside of the backward pass. Add this callback "
    f"before the other. {INSTEAD}"
)


@dataclass
class CapturedStep:
    """A step that is being captured, as far as the events have come."""

    number: int
    epoch: float
    probes: Mapping[str, RiskGradient]
    n_micro: int = 1
    clip_scale: float = math.nan
    skipped: bool = False
    stepped: Sequence[bool] | None = None
    lr: float = math.nan
    optimizer: Mapping[str, Any] | None = None
    measured: Measurement | None = None
    rectifier: GradientTransform | None = None
    _own: Vector | None = None  # the objective's gradient, where another one is handed on
    _grad_norm: float = math.nan  # before clipping; NaN where the Trainer has not taken it
    _loss_scale: float = 1.0  # before the optimizer's step
    _vectors: dict[str, Vector] = field(default_factory=dict)
    _weights: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def meet(
        self, rectifier: GradientTransform, gradients: Gradients, parameters: Sequence[Tensor]
    ) -> None:
        """Take the gradient of the objective, which a rectifier is about to change."""
        if self._vectors:
            return  # it has been stepped already
        self.rectifier = rectifier
        if rectifier.changes_gradient:
            of_objective = gradients.of(OBJECTIVE, copy=True)
            own = dict(zip(map(id, gradients.parameters), of_objective, strict=True))
            self._own = [own.get(id(parameter)) for parameter in parameters]

    def see(
        self,
        follower: StepFollower,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler | None,
        *,
        copy: bool,
    ) -> None:
        """Take the gradient that lies in `.grad`, and what to compare it with.

        `copy` where it is to be compared with the update: optimizers may use its memory.
        """
        check_descends(unwrapped(optimizer))  # a schedule may have turned it
        grads = [parameter.grad for parameter in follower.parameters]
        if all(grad is None for grad in grads):
            raise RuntimeError(
                "A parameter should have a gradient before the optimizer steps. Found none at step "
                f"{self.number}: they were taken away by {CULPRITS}"
            )
        self._vectors = {name: probe.vector for name, probe in self.probes.items()}
        self._weights = {name: {name: 1.0} for name in self.probes}
        follower.begin()
        self._loss_scale = current_scale(scaler)
        self._vectors[SEEN] = [None if g is None else g.clone() for g in grads] if copy else grads

    def note_clipping(
        self, grad_norm: Tensor | float | None, limit: float | None, *, scale: float | None
    ) -> None:
        """Take note of the norm before clipping, and of what the gradient is a multiple by.

        `scale` is that of the gradient which was seen, as clipped; None if it was not clipped yet.
        """
        if grad_norm is not None:
            self._grad_norm = float(grad_norm)
            if not 0 <= self._grad_norm < math.inf:
                self._vectors.pop(SEEN)  # a gradient without direction
                return
        self.clip_scale = clip_scale(grad_norm, limit)
        if self.skipped:
            return
        seen = 1.0 if scale is None else self.clip_scale * scale
        self._weights[self._handed_on] = {SEEN: 1 / seen}
        if self._own is not None:
            self._vectors[OBJECTIVE], self._weights[OBJECTIVE] = self._own, {OBJECTIVE: 1.0}

    def move(
        self, follower: StepFollower, optimizer: torch.optim.Optimizer, scaler: GradScaler | None
    ) -> None:
        """Take what the optimizer made of it."""
        # Not what accelerate says: it takes a step that a fused optimizer skipped for a step.
        overflowed = distributed.has_skipped(unwrapped(optimizer))
        self.skipped = overflowed or current_scale(scaler) < self._loss_scale
        self.lr = rate_of(optimizer)
        self.optimizer = described(unwrapped(optimizer))
        if not self.skipped:
            follower.leave(unwrapped(optimizer))
        move = follower.news(at_gradient=False)
        assert move is not None  # the first that is told
        if self.skipped:
            for name in (OBJECTIVE, RECTIFIED):
                self._weights.pop(name, None)
        else:
            self._take(move)

    def sources(self, *, update: bool) -> tuple[str, ...]:
        """The sources that the step has, whether or not they are defined in it."""
        own = sources_of(self.rectifier)
        return (OBJECTIVE, *self.probes, *own, *([UPDATE] if update else []))

    def amend(self, follower: StepFollower, recording: Recording, *, update: bool) -> None:
        """The next gradient is about to be taken: add to the row what has moved since."""
        if update and not self.skipped and not recording.failed:
            move = follower.news(at_gradient=True)
            if move is not None:
                self._take(move)
                self.measure(recording)
                recording.amend(self.entry(update=update))
        follower.end()

    def measure(self, recording: Recording) -> Measurement:
        """What is to be kept of the gradients, once all of them are there."""
        losses = {name: probe.loss for name, probe in self.probes.items()}
        watched = {} if self.rectifier is None else self.rectifier.watched
        # An average of nothing yet is absent, not zero.
        averages = {name: v for name, v in watched.items() if any(x is not None for x in v)}
        self.measured = recording.measure(
            self.number,
            {**self._vectors, **averages},
            losses,
            {**self._weights, **{name: {name: 1.0} for name in averages}},
        )
        if self._handed_on in self.measured.names:
            self._check_norm(self.measured)
        return self.measured

    def entry(self, *, update: bool) -> Entry:
        """What the file is told of the step."""
        assert self.measured is not None
        return Entry(
            self.number,
            self.measured,
            dict.fromkeys([OBJECTIVE, *self.probes], "loss"),
            epoch=self.epoch,
            lr=self.lr,
            n_micro=self.n_micro,
            clip_scale=self.clip_scale,
            skipped=self.skipped,
            stepped=self.stepped,
            rectifier=self.rectifier,
            optimizer=self.optimizer,
            sources=self.sources(update=update),
        )

    @property
    def _handed_on(self) -> str:
        """The source that the optimizer gets."""
        return OBJECTIVE if self._own is None else RECTIFIED

    def _take(self, move: Move) -> None:
        """Take what has moved since the gradient was seen."""
        self.stepped = move.stepped
        if move.update is not None:
            self._vectors[UPDATE] = move.update
            self._weights[UPDATE] = {UPDATE: 1.0}

    def _check_norm(self, measured: Measurement) -> None:
        """Refuse a gradient whose length is not the one that the Trainer found before clipping."""
        index = measured.names.index(self._handed_on)
        norm = float(gram.norm(measured.gram.sum(dim=0), index))
        # Rounding of half precision aside.
        if abs(norm - self._grad_norm) > 0.02 * self._grad_norm:
            raise RuntimeError(
                f"The gradient before clipping should have the norm that the Trainer logs, "
                f"{self._grad_norm:.6g}. Found {norm:.6g} at step {self.number}: the gradients "
                f"were changed between clipping and this callback by {CULPRITS}"
            )
