"""The rectifier: makes unlearning steps that do not harm what should stay."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.gradients import Gradients, Loss, Rectification, Vector, peak, reduced
from geffect.layers import describe, trainable
from geffect.losses import Passes, declared, loss_scale, plan
from geffect.sources import OBJECTIVE, RETAIN, average_of
from geffect.steps import check_owned, moved_by, tensors_of, unwrapped

from .attachment import Attachment, check_free
from .elementwise import Elementwise
from .memory import RetainMemory, State
from .options import LABELS, Correction, Options, Part, Scope, SpaceName
from .projector import PendingReport, Projector
from .rules import Rule, gru
from .scopes import Blocks, GramAccumulator, Mask, block_names, held, parts, skipped
from .selection import Selection
from .spaces import GradientSpace, UpdateSpace, steps_tensor_by_tensor

FORMAT = 2
"""Of the state of a rectifier."""

LOST = 1e-3
"""The cosine that is left where half precision has rounded a correction away."""


class Rectifier:
    """Rectifies the unlearning gradient, or the optimizer's own step, against the retain gradient.

    With the defaults this is GRU (arXiv 2503.09117): where the objective gradient u has a negative
    inner product with the running average r of the retain gradients, its component along r is
    removed. The average weighs the new gradient with `ema`, which is 1 - momentum; it starts at the
    first one.

    - `rule`: from a Gram matrix to weights, such as `geffect.projection.gru`, or a rule for every
      coordinate such as `SAGO()`; None for none.
    - `protect`: the losses whose gradients are not to be harmed. Each has its own average;
      `nearest` and `off_span` know what to do with several.
    - `scope`: what one constraint covers: the whole "model", each "group" of layers, "layer" or
      "parameter", or each "coordinate" (those that would harm r stay where they are).
    - `space`: "gradient" changes `.grad` before the optimizer steps, as in the paper. "update"
      changes the step that `optimizer` takes, so that the constraint holds for what is applied:
      adaptive optimizers rescale a rectified gradient and break it. The optimizer is not wrapped;
      give it here, or to `attach` once there is one. In gradient space it is needed where it does
      not step all parameters: the others then take no part.
    - `part`: "total" rectifies the whole objective. "forget" rectifies it without its share of the
      losses in `protect`, and adds that behind, unless the rule adds the retain gradient itself: of
      an objective that is declared as a combination.
    - `select`: keep only this fraction of the coordinates, those that the objective needs most and
      the retain data least, or what another `Selection` chooses; before the rule.
    - `correction`: in update space, what is added to a step that harms: a multiple of r, or with
      "retain_adam" of r / sqrt(v), v the running mean square of the retain gradients.
    - `state`: how the averages are kept, see `State`.
    - `measure_update`: also measure what the optimizer makes of the step,
      `report.applied_average` and `report.applied_fresh`. Costs a copy of the parameters and of the
      retain gradient.

    A retain gradient that is zero or not finite rectifies nothing and stays out of the average:
    `skipped` counts such steps and the first one warns. With rule=None and no `select` nothing is
    changed, and a recorder still gets the running average.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> rectifier = Rectifier(model)
    >>> loss = model(torch.ones(2)).sum()
    >>> rectifier.backward(objective={"retain": -1.0}, retain=loss)
    >>> model.weight.grad, rectifier.report.fired
    (tensor([[0., 0.]]), (1.0,))
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | Elementwise | None = gru,
        *,
        protect: str | Sequence[str] = RETAIN,
        scope: Scope = "model",
        space: SpaceName = "gradient",
        part: Part = "total",
        optimizer: torch.optim.Optimizer | None = None,
        ema: float = 0.8,
        select: float | Selection | None = None,
        correction: Correction = "retain",
        state: State | None = None,
        measure_update: bool = False,
    ) -> None:
        self.skipped = 0
        self._warned = False
        self._options = Options(
            rule, _as_tuple(protect), scope, space, part, ema, select, correction, measure_update
        )
        self._model = model
        self._memory = RetainMemory(
            self._options.protect,
            ema,
            second_moment=self._options.needs_second_moment,
            state=state or State(),
        )
        self._names = list(trainable(model))
        self._blocks = Blocks.of([*map(LABELS[scope], describe(model))])
        self._generator = torch.Generator().manual_seed(0)
        self._parameters: list[Tensor] = []  # looked up at the first step
        self._window: Gradients | None = None
        self._usable = self._armed = self._overflowed = False
        self._report: PendingReport | None = None
        self._applied: GramAccumulator | None = None
        self._fresh: list[Vector] = []
        self._step: tuple[UpdateSpace, Mask | None] | None = None
        self._put_back: Callable[[], None] | None = None
        self._room: dict[int, Tensor] = {}  # of the copies of the parameters
        self._attachment: Attachment | None = None
        if optimizer is not None:
            self.attach(optimizer)

    @property
    def watched(self) -> Mapping[str, Vector]:
        """The running averages of the retain gradients, as sources such as `retain_ema`."""
        absent: Vector = [None] * len(self._names)
        return {
            average_of(name): self._memory.vector(name) if self._memory.ready else absent
            for name in self._options.protect
        }

    @property
    def blocks(self) -> tuple[str, ...]:
        """What `report` has a number for."""
        return block_names(self._blocks, self._options.protect)

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up."""
        return self._options.record

    @property
    def needs_optimizer(self) -> bool:
        """Whether it has to be attached to the optimizer before a step."""
        return self._options.needs_optimizer

    @property
    def protect(self) -> tuple[str, ...]:
        """The losses whose gradients are not to be harmed."""
        return self._options.protect

    @property
    def part(self) -> Part:
        """The part of the objective that is rectified."""
        return self._options.part

    @property
    def report(self) -> Rectification | None:
        """What it did in the step that has just been taken; None where there was none.

        Of a sharded model it is added up over the processes: read it on all of them.
        """
        if self._report is None:
            return None
        report = self._report()
        if self._applied is not None:
            products, count = self._applied.by_block()[:, 0, 1:], len(self._options.protect)
            report = replace(
                report,
                applied_average=tuple(products[:, :count].flatten().tolist()),
                applied_fresh=tuple(products[:, count:].flatten().tolist()),
            )
        self._report, self._applied = (lambda: report), None
        return report

    def backward(
        self, *, accumulate: bool = False, scaler: GradScaler | None = None, **losses: Loss
    ) -> None:
        """The gradient of `objective` into `.grad`, rectified against those of the retain losses.

        Losses are as for `geffect.Recorder.backward`; use that one to record the step too. With
        `accumulate`, True for all but the last micro-batch of a step, nothing is left in `.grad`
        until the last, and what is rectified is the sum. A `scaler` multiplies what goes into
        `.grad`: pass losses as they are, then call `scaler.unscale_` and `scaler.step` as always.
        Under DDP, compute the losses inside of `with model.no_sync():`.
        """
        protect = self._options.protect
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, None
        with distributed.raise_on_all_ranks() as ranks:
            self._check_losses(losses)
            parameters = self._begun()
            distributed.check_unsynchronised(self._model)
            scale = loss_scale(scaler, parameters[0].device)
            first = {name: losses[name] for name in protect}
            passes = plan(parameters, {**first, **losses}, scale=scale)
            ranks.check_same_on_ranks([*declared(losses).items()], accumulate)
        retain, objective = passes.of(protect), passes.of([OBJECTIVE])
        self._check_reached(objective)
        apart = not retain.tensors.keys() & objective.tensors.keys()
        alone = (
            not accumulate and window is None and scale == 1.0 and not self._options.measure_update
        )
        if apart and alone:
            # So that the two gradients are never in memory at once: the average takes the first in.
            self.observe(reduced(self._model, parameters, retain))
            self.rectify(reduced(self._model, parameters, objective))
            return
        gradients = reduced(self._model, parameters, passes.of([*protect, OBJECTIVE]))
        if window is None:
            window = gradients
        else:
            window.add_(gradients)
        if accumulate:
            self._window = window
        else:
            self.observe(window)
            self.rectify(window)

    def observe(self, gradients: Gradients) -> None:
        """Take the retain gradients of a step into the running averages, before `.grad` is written.

        A step is rectified as a whole, so nothing of an earlier backward may lie in `.grad`.
        """
        self._begun()
        self._check_retain(gradients.sources)
        self._forget_step()  # of an optimizer that raised, or never stepped
        self._check_step(gradients)
        self._report = self._applied = None
        self._fresh, self._usable = [], False
        self._overflowed = gradients.scale != 1.0 and _overflows(gradients)
        if self._overflowed:
            return  # the GradScaler skips this step, as if it had not been
        retain = {name: gradients.of(name) for name in self._options.protect}
        problem = self._memory.update(retain, agree=not self._alone)
        self._usable = problem is None
        if problem is not None:
            self._skip(f"the retain gradient is {problem}")
        elif self._options.measure_update:
            self._fresh = [*retain.values()]

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the objective's gradient in `.grad`, rectified, or arm the optimizer's step."""
        copy = copy or self._options.measure_update
        if self._options.part == "total":
            gradients.deposit(copy=copy)
            self._rectify(gradients.scale)
            return
        protect = self._options.protect
        behind = {name for source in protect for name in gradients.weights.get(source, ())}
        gradients.deposit(among=gradients.vectors.keys() - behind, copy=copy)
        self._rectify(gradients.scale)
        if not self._options.adds_retain:
            gradients.deposit(among=behind, copy=copy)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Rectify, or follow, the steps of this optimizer from now on, and of no other.

        In gradient space what it does not step takes no part in the constraint from now on.
        """
        optimizer = unwrapped(optimizer)
        check_owned(optimizer, trainable(self._model).values())
        check_free(optimizer, self)
        self.detach()
        self._attachment = Attachment(optimizer, self._before_step, self._after_step)

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self._forget_step()
        if self._attachment is not None:
            self._attachment.end()
        self._attachment = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that is continued needs, to go on as if it had not been stopped.

        The averages by the names of the parameters, as they are kept: those of a sharded model are
        sharded like its parameters.
        """
        return {
            "format": FORMAT,
            "options": dict(self.options),
            "memory": self._memory.state_dict(self._names),
            "generator": self._generator.get_state(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a rectifier that was set up alike had come to, on the same model."""
        if state.get("format") != FORMAT:
            raise ValueError(
                f"The state of a rectifier should have format {FORMAT}. Found "
                f"{state.get('format')!r}. Pass what `state_dict()` of a rectifier gave."
            )
        if state["options"] != self.options:
            raise ValueError(
                "The rectifier should be set up as the one whose state it takes: "
                f"{state['options']}. Found {self.options}. Make it with the same arguments."
            )
        self._memory.load_state_dict(state["memory"], trainable(self._model))
        self._forget_step()
        self._window = self._report = self._applied = None
        self._generator.set_state(state["generator"].cpu())  # wherever the rest was loaded to
        self.skipped = state["skipped"]

    @property
    def _projector(self) -> Projector:
        return Projector(
            self._options, self._blocks, self._parameters, self._memory, self._generator
        )

    @property
    def _alone(self) -> bool:
        """Whether each process decides for the coordinates that it holds, and asks no other."""
        options = self._options
        alone = options.by_coordinate and options.selection is None and not options.measure_update
        return alone and all(map(distributed.is_sharded, self._parameters))

    def _begun(self) -> list[Tensor]:
        """The parameters, which sharding and the like may replace until the first step."""
        found = trainable(self._model)
        if list(found) != self._names:
            raise ValueError(
                "The parameters that require a gradient should be those that the rectifier was "
                f"made for, {len(self._names)}. Found {len(found)}, frozen or added since. Make it "
                "when the model is as it will be trained."
            )
        if not self._parameters:
            distributed.check_layout(self._model)
            self._parameters = list(found.values())
        if any(p is not q for p, q in zip(self._parameters, found.values(), strict=True)):
            raise ValueError(
                "The parameters should stay the tensors that they were at the first step. Found "
                "others of the same names. Make a new rectifier, and load the state of this one."
            )
        return self._parameters

    def _rectify(self, scale: float) -> None:
        if self._overflowed:
            _tell_scaler(self._moved().values())
        if self._usable and self._options.by_coordinate and self._breaks():
            self._usable = False
            self._skip("the gradient of the objective is not finite")
        self._armed = self._options.needs_optimizer and self._usable
        if self._attachment is not None and self._armed:
            self._attachment.come_last()
        if self._options.space == "gradient" and self._usable:
            projector, moved = self._projector, self._moved()
            with torch.no_grad():
                if self._options.adds_retain:
                    self._make_room(moved)
                mask = projector.mask([p for i, p in moved.items()])
                space = GradientSpace(moved, scale)
                self._done(projector.change(space, mask))

    def _breaks(self) -> bool:
        """Whether the objective's gradient, in `.grad`, is not finite: no Gram matrix tells."""
        breaks = not peak(p.grad for p in self._moved().values()) < float("inf")
        return breaks if self._alone else distributed.any_rank(breaks)

    def _moved(self) -> dict[int, Tensor]:
        """What the optimizer steps, where it is known, by the places of the parameters."""
        everything = dict(enumerate(self._parameters))
        if self._attachment is None:
            return everything
        stepped = set(map(id, tensors_of(self._attachment.optimizer)))
        return {i: p for i, p in everything.items() if id(p) in stepped}

    def _make_room(self, moved: Mapping[int, Tensor]) -> None:
        """A gradient, of zero, where only the retain data have one to be added."""
        for i, parameter in moved.items():
            if parameter.grad is None and any(r is not None for r in self._memory.retain(i)):
                parameter.grad = torch.zeros_like(parameter)

    def _before_step(self) -> None:
        armed, self._armed = self._armed, False
        if not armed:
            return
        assert self._attachment is not None
        optimizer, options, projector = self._attachment.optimizer, self._options, self._projector
        check_owned(optimizer, self._parameters)
        changes = options.space == "update"
        # What is somebody else's may raise, and then all of the step is taken back.
        ours = options.is_ours and steps_tensor_by_tensor(optimizer)
        if changes and options.by_coordinate and ours and not options.measure_update:
            self._put_back, self._report = projector.step(optimizer)
            return
        mask = projector.mask(moved_by(optimizer)) if changes else None
        # Now, as optimizers may use the memory of a gradient for their own ends.
        masks = None if mask is None else [*map(mask, range(len(self._parameters)))]
        step = UpdateSpace.ahead_of(optimizer, self._parameters, self._room)
        self._step = step, None if masks is None else masks.__getitem__

    def _after_step(self) -> None:
        prepared = self._step
        self._forget_step()
        if prepared is None:
            return
        step, mask = prepared
        with torch.no_grad():
            if self._options.space == "update":
                try:
                    self._done(self._projector.change(step, mask))
                except BaseException:
                    step.undo()
                    raise
            if self._options.measure_update:
                self._see(step)
        self._fresh = []

    def _forget_step(self) -> None:
        """Nothing is left of a step that has ended, or raised, or was never taken."""
        self._armed, self._step = False, None
        put_back, self._put_back = self._put_back, None
        if put_back is not None:
            put_back()

    def _see(self, step: UpdateSpace) -> None:
        """Take the inner products of the step that was applied."""
        tally = GramAccumulator(self._blocks, self._parameters, 1 + 2 * len(self._options.protect))
        for i in range(len(self._parameters)):
            others = held([*self._memory.retain(i), *(vector[i] for vector in self._fresh)])
            for where in step.parts(i):
                tally.add(i, [step.direction(i, where), *parts(others, where)])
        self._applied = tally

    def _done(self, report: PendingReport | None) -> None:
        if report is None:
            self._skip("the gradient or the step is not finite")
        else:
            self._report = report
            if self._options.space == "update" and not self._options.by_coordinate:
                self._warn_of_rounding(report())

    def _warn_of_rounding(self, report: Rectification) -> None:
        lost = any(
            product < -LOST * length * retain
            for product, length, retain in zip(
                report.inner_after, report.norm_after, report.retain_norm, strict=True
            )
        )
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                "A step still harms what it should not: its correction is below the rounding of "
                'the parameters. Keep them in float32, or pass scope="coordinate", which is exact '
                "in any type. This is said once.",
                stacklevel=2,
            )

    def _skip(self, reason: str) -> None:
        nothing = skipped(self.blocks)
        # Where each decides alone, the others add up what they did: nothing is this one's share.
        self._report = self._projector.nothing if self._alone else lambda: nothing
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=4,
            )
        self.skipped += 1

    def _check_losses(self, losses: Mapping[str, Loss]) -> None:
        if OBJECTIVE not in losses:
            raise ValueError(
                f"The losses of a rectified step should have one named `{OBJECTIVE}`. Found "
                f"{', '.join(losses) or 'none'}. Pass {OBJECTIVE}=loss."
            )
        self._check_retain(losses)
        if self._options.part == "forget" and isinstance(losses[OBJECTIVE], Tensor):
            raise ValueError(
                f'`{OBJECTIVE}` should be declared as a combination of losses with part="forget", '
                "which is rectified without the retain losses. Found a tensor. Pass weights such "
                f'as {OBJECTIVE}={{"forget": -1.0, "retain": 1.0}}.'
            )

    def _check_reached(self, objective: Passes) -> None:
        # FSDP2 has stand-ins for its parameters in the graph, a reentrant checkpoint has none.
        sharded = any(map(distributed.is_sharded, self._parameters))
        reached = sharded or objective.reach(self._parameters)
        if not reached and objective.accumulates_once:
            raise ValueError(
                "The losses should be computed with the model that the rectifier was made for. "
                f"Found none of its parameters in `{OBJECTIVE}`. Make the rectifier from that "
                "model."
            )

    def _check_step(self, gradients: Gradients) -> None:
        """Refuse a step that cannot be rectified as a whole."""
        if list(map(id, gradients.parameters)) != list(map(id, self._parameters)):
            raise ValueError(
                "The rectifier should be made for the model that is trained. Found gradients of "
                "another one, or of parameters that were frozen or added since. Make it from the "
                "same model."
            )
        grads = [p.grad for p in self._moved().values() if p.grad is not None]
        if any(bool(distributed.local(grad).any()) for grad in grads):
            raise ValueError(
                "`.grad` should be empty before a rectified step, which is rectified as a whole. "
                "Found gradients of an earlier backward. Call model.zero_grad() before, or pass "
                "the micro-batches with accumulate=True."
            )
        if self._options.needs_optimizer and self._attachment is None:
            raise ValueError(
                '`optimizer` should be given before a step with space="update" or '
                "measure_update=True. Found none. Pass Rectifier(..., optimizer=optimizer), or "
                "call rectifier.attach(optimizer)."
            )

    def _check_retain(self, sources: Iterable[str]) -> None:
        absent = [name for name in self._options.protect if name not in sources]
        if absent:
            raise ValueError(
                f"The losses of a rectified step should have one named `{absent[0]}`. Found "
                f"{', '.join(sources)}. Pass {absent[0]}=nll(model, {absent[0]}_batch)."
            )


def _as_tuple(protect: str | Sequence[str]) -> tuple[str, ...]:
    return (protect,) if isinstance(protect, str) else tuple(protect)


def _tell_scaler(parameters: Iterable[Tensor]) -> None:
    """Have the GradScaler skip a step, also where the objective alone would not overflow."""
    for parameter in parameters:
        if parameter.grad is not None and (own := distributed.local(parameter.grad)).numel():
            own[(0,) * own.dim()] = torch.inf
            return


def _overflows(gradients: Gradients) -> bool:
    """Whether a number of a step that was scaled up is not finite on any process."""
    # What was not, and has weight 1, no smaller scale would help.
    scaled = [v for n, v in gradients.vectors.items() if gradients.weights.get(n, {}).get(n) != 1.0]
    return distributed.any_rank(not all(peak(vector) < float("inf") for vector in scaled))
