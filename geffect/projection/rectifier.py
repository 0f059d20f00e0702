"""The rectifier: makes unlearning steps that do not harm what should stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.forwards import check_no_loss_asked
from geffect.gradients import AtCopy, Gradients, Loss, Rectification, Vector, reduced
from geffect.layers import describe, trainable
from geffect.losses import Passes, check_reached, declared, loss_scale, plan
from geffect.optimizers import check_owned, unwrapped
from geffect.sources import OBJECTIVE, RETAIN, average_of

from . import checks
from .attachment import Attachment, check_steps_alone, check_unattached
from .blocks import Blocks, block_names
from .elementwise import Elementwise
from .kept import State
from .listeners import tell
from .memory import RetainMemory
from .notices import Notices
from .options import LABELS, Correction, Options, Part, Scope, SpaceName, Start, as_rule
from .projector import Projector
from .rules import Rule, Weights, gru
from .selection import Selection
from .step import RectifiedStep
from .watch import StepWatch

FORMAT = 2
"""Of the state of a rectifier."""


class Rectifier:
    """Rectifies the unlearning gradient, or the optimizer's own step, against the retain gradient.

    With the defaults this is GRU (arXiv 2503.09117): where the gradient of the objective opposes
    the running average r of the retain gradients, its component along r is removed.

    - `rule`: from a Gram matrix to weights, such as `geffect.projection.gru`, or a rule for every
      coordinate such as `SAGO()`; None for none. One of your own declares what it adds: see `Rule`.
    - `protect`: the losses whose gradients are not to be harmed. Each has its own average;
      `nearest` and `off_span` know what to do with several.
    - `scope`: what one constraint covers: the whole "model", each "group" of layers, "layer" or
      "parameter", or each "coordinate" (those that would harm r stay where they are).
    - `space`: "gradient" changes `.grad` before the optimizer steps, as in the paper. "update"
      changes the step that `optimizer` takes: adaptive ones break the constraint on a gradient.
    - `part`: "total" rectifies the whole objective. "forget" rectifies it without its share of the
      losses in `protect`, and adds that behind, unless the rule adds the retain gradient itself.
    - `optimizer`: needed in update space, here or by `attach`; it is not wrapped. In gradient space
      it is needed where it does not step all parameters: the others then take no part.
    - `ema`: the weight of the new gradient in the average, from 0 to 1: 0.8 if left out.
    - `history`: how many earlier retain gradients constrain the step too, each by itself, beside
      the newest: for `nearest`. `ema` is then 1.0. Memory: 1 + history vectors of the model's size.
    - `ema_start`: the average starts at the "first" gradient; at "zero" as in public ports of GRU.
    - `select`: keep only this fraction of the coordinates, those that the objective needs most and
      the retain data least, or what another `Selection` chooses. That comes before the rule.
    - `correction`: in update space, what is added to a step that harms: a multiple of r, or with
      "retain_adam" of r / sqrt(v), v the running mean square of the retain gradients; "adam" takes
      v of the optimizer, an Adam or AdamW of torch.
    - `state`: how the averages are kept, see `State`.
    - `measure_update`: also measure what the optimizer makes of the step, `report.applied_average`
      and `report.applied_fresh`. Costs a copy of the parameters and of the retain gradient.

    Raises ValueError for options that do not go together, and for an optimizer that climbs, needs a
    closure (LBFGS) or steps other tensors than the model's.

    A retain gradient that is zero, not finite or rounding noise (no coordinate reaches 2^-23 times
    the objective's largest) rectifies nothing and stays out of the average: `skipped` counts such
    steps and the first one warns. A selection holds in them too, by the mean square so far; where
    there is none yet, by the objective gradient alone. With rule=None and no `select` nothing is
    changed, and a recorder still gets the running average.

    An interrupt (Ctrl-C, SIGTERM) or an error anywhere leaves whole what there is. An average has
    taken in a gradient in all parameters or in none; `.grad` holds a rectified gradient or what it
    held before, or nothing once the step was taken; in update space an interrupt of a step of
    torch.optim waits until it is rectified. One that comes inside of the optimizer's own code
    leaves what it would have left there, and one right behind the step of an optimizer that torch
    does not have may leave that step unrectified.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> rectifier = Rectifier(model)
    >>> rectifier.backward(
    ...     objective={"retain": -1.0}, retain=lambda: model(torch.ones(2)).sum())
    >>> model.weight.grad, rectifier.report.fired
    (tensor([[0., 0.]]), (1.0,))
    >>> rectifier
    Rectifier(rule=gru, protect=('retain',), scope='model', space='gradient', ema=0.8)
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | Elementwise | Weights | None = gru,
        *,
        protect: str | Sequence[str] = RETAIN,
        scope: Scope = "model",
        space: SpaceName = "gradient",
        part: Part = "total",
        optimizer: torch.optim.Optimizer | None = None,
        ema: float | None = None,
        ema_start: Start = "first",
        select: float | Selection | None = None,
        correction: Correction = "retain",
        history: int = 0,
        state: State | None = None,
        measure_update: bool = False,
    ) -> None:
        sets = (protect,) if isinstance(protect, str) else tuple(protect)
        weight = (1.0 if history else 0.8) if ema is None else ema
        self._options = options = Options(
            as_rule(rule), sets, scope, space, part, weight, ema_start, select, correction, history,
            measure_update,
        )  # fmt: skip
        self.options: Mapping[str, object] = options.record
        self.protect, self.part = options.protect, options.part
        self.needs_optimizer = options.needs_optimizer  # before a step, to be attached to it
        self._model, self._names = model, list(trainable(model))
        self._memory = RetainMemory(
            sets,
            weight,
            second_moment=options.needs_second_moment,
            state=state or State(),
            from_zero=ema_start == "zero",
            history=history,
        )
        self._blocks = Blocks.of([*map(LABELS[scope], describe(model))])
        self.blocks = block_names(self._blocks, sets)  # what a report has a number for
        self._generator = torch.Generator().manual_seed(0)
        self._notices, self._agreement = Notices(), distributed.Agreement()
        self._projector: Projector | None = None  # sharding may replace parameters until a step
        self._window: Gradients | None = None
        self._step: RectifiedStep | None = None
        self._attachment: Attachment | None = None
        self._watch = StepWatch(self._notices)
        if optimizer is not None:
            self.attach(optimizer)

    def __repr__(self) -> str:
        state = self._memory.state
        return f"Rectifier({self._options}{'' if state == State() else f', {state=}'})"

    @property
    def watched(self) -> Mapping[str, Vector]:
        """The running averages of the retain gradients, as sources such as `retain_ema`."""
        absent: Vector = [None] * len(self._names)
        return {
            average_of(name): self._memory.vector(name) if self._memory.ready else absent
            for name in self.protect
        }

    @property
    def changes_gradient(self) -> bool:
        """Whether `.grad` is changed: in gradient space, by a rule or a selection."""
        return self._options.changes_gradient

    @property
    def skipped(self) -> int:
        """How many steps were not rectified, because a gradient was none."""
        return self._notices.skipped

    @property
    def report(self) -> Rectification | None:
        """What it did in the step that has just been taken; None where there was none.

        Of a sharded model it is added up over the processes: read it on all of them.
        """
        return None if self._step is None else self._step.report

    def backward(
        self,
        *,
        accumulate: bool = False,
        scaler: GradScaler | None = None,
        relearned: AtCopy | None = None,
        **losses: Loss,
    ) -> None:
        """Leave in `.grad` the gradient of `objective`, rectified against the retain gradients.

        - `accumulate`: True for all but the last micro-batch of a step. Nothing is left in `.grad`
          until the last, and the sum is rectified.
        - `scaler`: multiplies what goes into `.grad`. Pass losses as they are, then call
          `scaler.unscale_` and `scaler.step` as always.
        - `relearned`: a `geffect.Relearned`, where the gradient of the objective is taken alone.
        - `losses`: as for `geffect.Recorder.backward`; use that one to record the step too.

        Under DDP, losses that are tensors are computed inside of `with model.no_sync():`.
        """
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, None
        check_no_loss_asked()
        parameters = self._begun().parameters
        with self._agreement.step(parameters, early=relearned is not None) as step:
            checks.check_losses(losses, self._options)
            distributed.begin_micro_batch(parameters, first=window is None, accumulate=accumulate)
            passes = _passes(
                self._model, parameters, losses, self.protect, relearned, scaler, later=step.later
            )
            step.check_same_on_ranks(declared(losses), [*passes.order.tensors], accumulate)
            whole = not (accumulate or window or self._options.measure_update)
            apart = whole and _is_apart(passes, self.protect)
            first = passes.of(self.protect) if apart else passes
            gradients = reduced(
                self._model, parameters, first, peaks_of=self.protect, exchange=step.settle
            )
        if apart:
            self.observe(gradients)
            del gradients  # the average has it: the two are never in memory at once
            self.rectify(reduced(self._model, parameters, passes.of([OBJECTIVE])))
            return
        if window is not None:
            window.add_(gradients)
            gradients = window
        if accumulate:
            self._window = gradients
        else:
            self.observe(gradients)
            self.rectify(gradients)

    def observe(self, gradients: Gradients) -> None:
        """Take the retain gradients of a step into the running averages, before `.grad` is written.

        A step is rectified as a whole, so nothing of an earlier backward may lie in `.grad`.
        """
        projector = self._begun()
        checks.check_retain(gradients.sources, self._options)
        self._step = None  # one whose optimizer raised, or never stepped
        gradients.check_of(projector.parameters)
        checks.check_dense(gradients)
        checks.check_nothing_left(projector.held(self._optimizer).values())
        checks.check_optimizer(self._options, self._optimizer)
        self._step = RectifiedStep(projector, self._notices)
        self._step.take_in(gradients)

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the objective's gradient in `.grad`, rectified, or arm the optimizer's step."""
        if self._step is None:
            raise ValueError(
                "`observe` should be called before `rectify`, with the gradients of the same step. "
                "Found no step that was observed. Call observe(gradients) first."
            )
        checks.check_dense(gradients)
        tell(self, gradients)
        # Hooks first: where they cannot be registered, `.grad` stays as it is.
        if self._attachment is not None:
            self._attachment.come_closest()
        self._watch.begin()
        try:
            self._step.change(gradients, self._begun().moved(self._optimizer), copy=copy)
        except BaseException:
            self._step = None
            raise
        left = gradients.parameters if self._step.promises else ()
        self._watch.expect(left, self._optimizer, self._step.changes_step)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Rectify, or follow, the steps of this optimizer from now on, and of no other.

        What it does not step takes no part, and may not be stepped by the same gradient.
        """
        optimizer = unwrapped(optimizer)
        check_owned(optimizer, trainable(self._model).values())
        check_steps_alone(optimizer)
        checks.check_optimizer(self._options, optimizer)
        check_unattached(optimizer, self)
        self._watch.check_between_steps()
        self.detach()
        self._attachment = Attachment(optimizer, self._before_step, self._after_step)

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self._abandon()
        if self._attachment is not None:
            self._attachment.end()
        self._attachment = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that is continued after a step needs, to go on as if it had not been stopped.

        The averages by the names of the parameters, as they are kept: sharded like a sharded model.
        Micro-batches of a step that is not whole are not in it: begin that step anew.
        """
        return {
            "format": FORMAT,
            "options": dict(self.options),
            "memory": self._memory.state_dict(self._names),
            "generator": self._generator.get_state(),
            "skipped": self.skipped,
            "pieces": distributed.pieces(trainable(self._model)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a rectifier that was set up alike had come to, on the same model."""
        parameters = trainable(self._model)
        checks.check_state(state, FORMAT, self.options, distributed.pieces(parameters))
        self._memory.load_state_dict(state["memory"], parameters)
        self._abandon()
        self._window = self._step = None
        self._generator.set_state(state["generator"].cpu())  # wherever the rest was loaded to
        self._notices.skipped = state["skipped"]

    def _begun(self) -> Projector:
        """What changes the parameters, which are the same from the first step on."""
        known = self._projector
        parameters = checks.same_parameters(
            self._model, self._names, None if known is None else known.parameters
        )
        if known is None:
            self._projector = known = Projector(
                self._options, self._blocks, parameters, self._memory, self._generator
            )
        return known

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._attachment is None else self._attachment.optimizer

    def _before_step(self) -> None:
        check_no_loss_asked()
        if self._step is not None and self._optimizer is not None:
            self._step.before(self._optimizer)
        self._watch.enter()

    def _after_step(self) -> None:
        if self._step is not None:
            self._step.after()
        self._watch.leave()

    def _abandon(self) -> None:
        self._watch.end()
        if self._step is not None:
            self._step.abandon()


def _passes(
    model: nn.Module,
    parameters: Sequence[Tensor],
    losses: Mapping[str, Loss],
    protect: Sequence[str],
    relearned: AtCopy | None,
    scaler: GradScaler | None,
    *,
    later: bool,
) -> Passes:
    """The passes that a step needs to be rectified: those of the objective and of what stays."""
    scale = loss_scale(scaler, parameters[0].device)
    passes = plan(
        parameters,
        losses,
        scale=scale,
        model=model,
        protected=protect,
        elsewhere=relearned.elsewhere(model, losses, scaler) if relearned else None,
        told_later=later,
    ).of([*protect, OBJECTIVE])
    check_reached(passes, parameters)
    if passes.order.tensors:
        distributed.check_unsynchronised(model)
    return passes


def _is_apart(passes: Passes, protect: Sequence[str]) -> bool:
    """Whether passes of the retain losses come first, and none of them is of the objective.

    Functions of the objective are asked before those of the retain losses.
    """
    order = passes.order
    apart = [*order.of(protect).given, *order.of([OBJECTIVE]).given]
    return order.scale == 1.0 and list(order.tensors) == apart
