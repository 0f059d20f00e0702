"""The rectifier: makes unlearning steps that do not harm what should stay."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.gradients import Gradients, Loss, Rectification, Vector, reduced
from geffect.layers import describe, trainable
from geffect.losses import loss_scale, plan
from geffect.sources import OBJECTIVE, RETAIN, average_of

from .elementwise import Elementwise, Halt
from .memory import RetainMemory, State
from .rules import Rule, gru
from .scopes import (
    Blocks,
    Constraint,
    Coordinates,
    Mask,
    Metric,
    Tally,
    block_names,
    skipped,
)
from .selection import Salient, Selection
from .spaces import (
    GradientSpace,
    Space,
    UpdateSpace,
    around_step,
    copied,
    moved_by,
    step_in_portions,
    steps_tensor_by_tensor,
    unwrapped,
)

Scope = Literal["model", "group", "layer", "parameter", "coordinate"]
SpaceName = Literal["gradient", "update"]
Part = Literal["total", "forget"]
Correction = Literal["retain", "retain_adam"]

LABELS: Mapping[str, Callable[[Any], str]] = {
    "model": lambda parameter: "model",
    "group": lambda parameter: parameter.group,
    "layer": lambda parameter: parameter.layer,
    "parameter": lambda parameter: parameter.name,
    "coordinate": lambda parameter: "model",
}
"""The block that a parameter belongs to, in each scope."""

FORMAT = 1
"""Of the state of a rectifier."""

EPSILON = 1e-8

_attached: "WeakKeyDictionary[torch.optim.Optimizer, ref[Rectifier]]" = WeakKeyDictionary()
"""Who rectifies or follows the steps of an optimizer."""


class Rectifier:
    """Rectifies the unlearning gradient, or the optimizer's own step, against the retain gradient.

    With the defaults this is GRU (arXiv 2503.09117): where the objective gradient u has a negative
    inner product with the running average r of the retain gradients, its component along r is
    removed. The average weighs the new gradient with `ema`; it starts at the first one.

    - `rule`: from a Gram matrix to weights, such as `geffect.projection.gru`, or a rule for every
      coordinate such as `SAGO()`; None for none.
    - `against`: the losses whose gradients are not to be harmed. Each has its own average;
      `nearest` and `off_span` know what to do with several.
    - `scope`: what one constraint covers: the whole "model", each "group" of layers, "layer" or
      "parameter", or each "coordinate" (those that would harm r stay where they are).
    - `space`: "gradient" changes `.grad` before the optimizer steps, as in the paper. "update"
      changes the step that `optimizer` takes, so that the constraint holds for what is applied:
      adaptive optimizers rescale a rectified gradient and break it. The optimizer is not wrapped;
      give it here, or to `attach` once there is one.
    - `part`: "total" rectifies the whole objective. "forget" rectifies it without its share of the
      losses in `against`, and adds that behind: of an objective that is declared as a combination.
    - `select`: keep only this fraction of the coordinates, those that the objective needs most and
      the retain data least, or what another `Selection` chooses; before the rule.
    - `correction`: in update space, what is added to a step that harms: a multiple of r, or with
      "retain_adam" of r / sqrt(v), v the running mean square of the retain gradients.
    - `state`: how the averages are kept, see `State`.
    - `follow`: also measure what the optimizer makes of the step, `report.applied_average` and
      `report.applied_fresh`. Costs a copy of the parameters and of the retain gradient.

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
        against: Sequence[str] = (RETAIN,),
        scope: Scope = "model",
        space: SpaceName = "gradient",
        part: Part = "total",
        optimizer: torch.optim.Optimizer | None = None,
        ema: float = 0.8,
        select: float | Selection | None = None,
        correction: Correction = "retain",
        state: State | None = None,
        follow: bool = False,
    ) -> None:
        _one_of("scope", scope, get_args(Scope))
        _one_of("space", space, get_args(SpaceName))
        _one_of("part", part, get_args(Part))
        _one_of("correction", correction, get_args(Correction))
        self.skipped = 0
        self.needs_optimizer = space == "update" or follow
        self._model = model
        self._rule, self._against, self._scope, self._space = rule, tuple(against), scope, space
        self._part, self._correction, self._follow = part, correction, follow
        self._selection = (
            select
            if select is None or isinstance(select, Selection)
            else Salient(_fraction("select", select))
        )
        self._check_together(optimizer)
        self._memory = RetainMemory(
            self._against,
            _fraction("ema", ema),
            second_moment=correction == "retain_adam"
            or (self._selection is not None and self._selection.needs_second_moment),
            state=state or State(),
        )
        table = describe(model)
        self._names = [parameter.name for parameter in table]
        self._blocks = Blocks.of([LABELS[scope](parameter) for parameter in table])
        self._parameters = list(trainable(model).values())
        self._begun = False
        # A generator of its own: the sample must not draw from the training's random numbers.
        self._generator = torch.Generator().manual_seed(0)
        self._window: Gradients | None = None
        self._usable = self._armed = False
        self._report: Callable[[], Rectification] | None = None
        self._applied: Tally | None = None
        self._fresh: list[Vector] = []
        self._step: UpdateSpace | None = None
        self._stepped_mask: Mask | None = None
        self._put_back: Callable[[], None] | None = None
        self._hooks: tuple[Any, ...] = ()
        self._optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self.attach(optimizer)

    @property
    def watched(self) -> Mapping[str, Vector]:
        """The running averages of the retain gradients, as sources such as `retain_ema`."""
        absent: Vector = [None] * len(self._parameters)
        return {
            average_of(name): self._memory.vector(name) if self._memory.ready else absent
            for name in self._against
        }

    @property
    def blocks(self) -> tuple[str, ...]:
        """What `report` has a number for."""
        return block_names(self._blocks, self._against)

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up."""
        return {
            "rule": None
            if self._rule is None
            else getattr(self._rule, "__name__", repr(self._rule)),
            "against": list(self._against),
            "scope": self._scope,
            "space": self._space,
            "part": self._part,
            "ema": self._memory.weight,
            "select": None if self._selection is None else repr(self._selection),
            "correction": self._correction,
        }

    @property
    def report(self) -> Rectification | None:
        """What it did in the step that has just been taken; None where there was none.

        Of a sharded model it is added up over the processes: read it on all of them.
        """
        if self._report is None:
            return None
        report = self._report()
        if self._applied is not None:
            products, count = self._applied.by_block()[:, 0, 1:], len(self._against)
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
        if OBJECTIVE not in losses:
            raise ValueError(
                f"The losses of a rectified step should have one named `{OBJECTIVE}`. Found "
                f"{', '.join(losses) or 'none'}. Pass {OBJECTIVE}=loss."
            )
        self._check_retain(losses)
        self._begin()
        # A window that fails is over: what follows begins another one.
        window, self._window = self._window, None
        distributed.check_unsynchronised(self._model)
        first = {name: losses[name] for name in self._against if name in losses}
        scale = loss_scale(scaler, self._parameters[0].device)
        passes = plan(self._parameters, {**first, **losses}, scale=scale)
        apart = not set(passes.of(self._against).tensors) & set(passes.of([OBJECTIVE]).tensors)
        alone = not accumulate and window is None and passes.scale == 1.0
        if apart and alone and not self._follow:
            # So that the two gradients are never in memory at once: the average takes the first in.
            self.observe(reduced(self._model, self._parameters, passes.of(self._against)))
            self.rectify(reduced(self._model, self._parameters, passes.of([OBJECTIVE])))
            return
        gradients = reduced(self._model, self._parameters, passes.of([*self._against, OBJECTIVE]))
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
        self._begin()
        self._check_retain(gradients.sources)
        if list(map(id, gradients.parameters)) != list(map(id, self._parameters)):
            raise ValueError(
                "The rectifier should be made for the model that is trained. Found gradients of "
                "another one, or of parameters that were frozen or added since. Make it from the "
                "same model."
            )
        self._forget_step()  # of an optimizer that raised, or never stepped
        if any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            raise ValueError(
                "`.grad` should be empty before a rectified step, which is rectified as a whole. "
                "Found gradients of an earlier backward. Call optimizer.zero_grad() before, or "
                "pass the micro-batches with accumulate=True."
            )
        if self.needs_optimizer and self._optimizer is None:
            raise ValueError(
                '`optimizer` should be given before a step with space="update" or follow=True. '
                "Found none. Pass Rectifier(..., optimizer=optimizer), or call "
                "rectifier.attach(optimizer)."
            )
        self._report = self._applied = None
        self._fresh = []
        self._usable = False
        if gradients.scale != 1.0 and _overflows(gradients):
            return  # the GradScaler skips this step, as if it had not been
        retain = {name: gradients.of(name) for name in self._against}
        # Coordinates need nobody's leave: each process decides for those that it holds.
        alone = self._by_coordinate and self._selection is None
        sharded = any(map(distributed.is_sharded, self._parameters))
        problem = self._memory.update(retain, agree=not (alone and sharded))
        self._usable = problem is None
        if self._follow:
            self._fresh = [*retain.values()]
        if problem is not None:
            self._skip(f"the retain gradient is {problem}")

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the objective's gradient in `.grad`, rectified, or arm the optimizer's step."""
        copy = copy or self._follow
        if self._part == "total":
            gradients.deposit(copy=copy)
            self._rectify(gradients.scale)
            return
        behind = {name for source in self._against for name in gradients.weights[source]}
        gradients.deposit(among=gradients.vectors.keys() - behind, copy=True)
        self._rectify(gradients.scale)
        gradients.deposit(among=behind, copy=True)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Rectify, or follow, the steps of this optimizer from now on, and of no other."""
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"`optimizer` should be a torch optimizer. Found `{type(optimizer).__name__}`. "
                "Pass optimizer=optimizer, the one that steps the model."
            )
        self._check_owned(optimizer, trainable(self._model).values())
        attached = _attached.get(optimizer)
        other = None if attached is None else attached()
        if other is not None and other is not self:
            raise ValueError(
                "An optimizer should have one rectifier. Found another one that is attached to it. "
                "Call detach() on that one before."
            )
        self.detach()
        _attached[optimizer] = ref(self)
        self._optimizer = optimizer
        self._hooks = around_step(
            optimizer, WeakMethod(self._before_step), WeakMethod(self._after_step)
        )

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self._forget_step()
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        if self._optimizer is not None:
            _attached.pop(self._optimizer, None)
        self._optimizer = None

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
                f"The rectifier should be set up as the one whose state it takes: "
                f"{state['options']}. Found {dict(self.options)}. Make it with the same arguments."
            )
        self._memory.load_state_dict(state["memory"], trainable(self._model))
        self._generator.set_state(state["generator"])
        self.skipped = state["skipped"]

    @property
    def _by_coordinate(self) -> bool:
        """Whether nothing about a coordinate depends on another one."""
        return self._scope == "coordinate" or self._rule is None or self._elementwise

    @property
    def _elementwise(self) -> bool:
        return isinstance(self._rule, Elementwise)

    def _begin(self) -> None:
        """Look the parameters up, which sharding and the like may have replaced until now."""
        if self._begun:
            return
        found = trainable(self._model)
        if list(found) != self._names:
            raise ValueError(
                "The parameters that require a gradient should be those that the rectifier was "
                f"made for, {len(self._names)}. Found {len(found)} at the first step, frozen or "
                "added since. Make it when the model is as it will be trained."
            )
        self._parameters = list(found.values())
        self._begun = True

    def _rectify(self, scale: float) -> None:
        self._armed = self.needs_optimizer and self._usable
        if self._space == "gradient" and self._usable:
            with torch.no_grad():
                mask = self._mask(self._parameters)
                self._change(GradientSpace(self._parameters, scale), mask)

    def _before_step(self) -> None:
        armed, self._armed = self._armed, False
        if not armed:
            return
        assert self._optimizer is not None
        self._check_owned(self._optimizer, self._parameters)
        alone = self._by_coordinate and steps_tensor_by_tensor(self._optimizer)
        if self._space == "update" and alone and not self._follow:
            self._put_back = self._step_in_portions(self._optimizer)
            return
        self._step = UpdateSpace.ahead_of(self._optimizer, self._parameters)
        if self._space == "update":
            mask = self._mask(moved_by(self._optimizer))
            # Now, as optimizers may use the memory of a gradient for their own ends.
            masks = None if mask is None else [*map(mask, range(len(self._parameters)))]
            self._stepped_mask = None if masks is None else masks.__getitem__

    def _after_step(self) -> None:
        step, mask = self._step, self._stepped_mask
        self._forget_step()
        if step is None:
            return
        with torch.no_grad():
            if self._space == "update":
                try:
                    self._change(step, mask)
                except BaseException:
                    step.undo()
                    raise
            if self._follow:
                self._see(step)
        self._fresh = []

    def _forget_step(self) -> None:
        """Nothing is left of a step that has ended, or raised, or was never taken."""
        self._armed, self._step, self._stepped_mask = False, None, None
        put_back, self._put_back = self._put_back, None
        if put_back is not None:
            put_back()

    def _step_in_portions(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Step with no more than a few tensors' old values in memory."""
        place = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        coordinates, mask = self._coordinates(), self._mask(moved_by(optimizer))

        def before(parameter: Tensor) -> tuple[Tensor, Tensor | None] | None:
            i = place.get(id(parameter))
            if i is None:
                return None
            return copied(parameter), None if mask is None else mask(i)

        def after(parameter: Tensor, state: tuple[Tensor, Tensor | None] | None) -> None:
            if state is None:
                return
            i = place[id(parameter)]
            space = UpdateSpace({i: parameter}, {i: state[0]})
            coordinates.change(space, i, self._memory.retain(i), state[1])

        put_back = step_in_portions(optimizer, before, after)
        self._report = coordinates.report
        return put_back

    def _change(self, space: Space, mask: Mask | None) -> None:
        """Change the space by the rule, and remember what was done."""
        if self._by_coordinate:
            coordinates = self._coordinates()
            for i in range(len(self._parameters)):
                coordinates.change(
                    space, i, self._memory.retain(i), None if mask is None else mask(i)
                )
            self._report = coordinates.report
            return
        assert not isinstance(self._rule, Elementwise)
        constraint = Constraint(self._blocks, self._parameters, self._against, self._rule)
        report = constraint.keep(space, self._memory.retain, mask, self._metric)
        if report is None:
            self._skip("the gradient or the step is not finite")
        else:
            self._report = lambda: report

    def _coordinates(self) -> Coordinates:
        rule = Halt() if self._scope == "coordinate" else self._rule
        assert rule is None or isinstance(rule, Elementwise)
        return Coordinates(self._blocks, self._parameters, self._against, rule)

    @property
    def _metric(self) -> Metric | None:
        if self._correction == "retain":
            return None

        def scale(i: int) -> Tensor | None:
            root = self._memory.scale(i)
            return None if root is None else distributed.local(root) + EPSILON

        return scale

    def _mask(self, moved: Sequence[Tensor]) -> Mask | None:
        """The mask of the coordinates to step on, chosen among those of what moves."""
        selection, memory = self._selection, self._memory
        if selection is None:
            return None
        among = set(map(id, moved))
        grads = [p.grad if id(p) in among else None for p in self._parameters]
        threshold = selection.threshold(grads, memory.scale, self._generator)

        def mask(i: int) -> Tensor | None:
            grad, scale = grads[i], memory.scale(i)
            if grad is None:
                return None
            local = None if scale is None else distributed.local(scale)
            return selection.mask(distributed.local(grad), local, threshold)

        return mask

    def _see(self, step: UpdateSpace) -> None:
        """Take the inner products of the step that was applied."""
        tally = Tally(self._blocks, self._parameters, 1 + 2 * len(self._against))
        for i in range(len(self._parameters)):
            fresh = [vector[i] for vector in self._fresh]
            tally.add(i, [step.direction(i), *self._memory.retain(i), *fresh])
        self._applied = tally

    def _skip(self, reason: str) -> None:
        report = skipped(self.blocks)
        self._report = lambda: report
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=4,
            )
        self.skipped += 1

    def _check_together(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Refuse arguments that contradict each other."""
        if optimizer is not None and not self.needs_optimizer:
            raise ValueError(
                '`optimizer` should be given with space="update", which changes its steps, or '
                'follow=True. Found one with space="gradient". Leave it out, or pass '
                'space="update".'
            )
        if self._scope == "coordinate" and self._rule is not gru:
            raise ValueError(
                'Scope "coordinate" should go with the rule gru, whose closed form it is. '
                f"Found `rule = {self._rule}`. Choose another scope, or leave the rule out."
            )
        if self._elementwise and self._scope != "model":
            raise ValueError(
                f'A rule for every coordinate should go with scope="model". Found {self._rule!r} '
                f"with scope={self._scope!r}. Leave the scope out."
            )
        if self._space == "gradient":
            if self._correction != "retain":
                raise ValueError(
                    '`correction` should be "retain" in gradient space, where the optimizer '
                    f'rescales what is added. Found {self._correction!r}. Pass space="update".'
                )
        elif self._part == "forget":
            raise ValueError(
                '`part` should be "total" in update space: a step of an optimizer has no parts. '
                'Found "forget". Pass space="gradient", or part="total".'
            )
        if self._rule is None:
            return
        # Asked in either space: a rule for one retain gradient refuses several here, not in a run.
        scaled = _depends_on_length(self._rule, len(self._against))
        if scaled and self._space == "update":
            raise ValueError(
                "A rule in update space should give the same for a retain gradient of any length: "
                f"it has none in common with a step. Found {self._rule!r}, which adds the retain "
                'gradient as it is. Pass space="gradient", or a rule such as gru or nearest.'
            )

    def _check_retain(self, sources: Iterable[str]) -> None:
        absent = [name for name in self._against if name not in sources]
        if absent:
            raise ValueError(
                f"The losses of a rectified step should have one named `{absent[0]}`. Found "
                f"{', '.join(sources)}. Pass {absent[0]}=nll(model, {absent[0]}_batch)."
            )

    def _check_owned(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = set(map(id, parameters))
        if not owned & own:
            raise ValueError(
                "`optimizer` should step the parameters of `model`. Found one that has none of "
                "them. Make it from model.parameters()."
            )
        foreign = {
            id(p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in own
        }
        if foreign:
            raise ValueError(
                "`optimizer` should step the parameters of `model` and no others, which nothing "
                f"here could rectify. Found {len(foreign)} tensors that are not the model's, or "
                "were unfrozen since the rectifier was made. Give those an optimizer of their own, "
                "or make the rectifier when the model is as it will be trained."
            )


def _depends_on_length(rule: Rule | Elementwise, count: int) -> bool:
    """Whether a rule makes something else of retain gradients that are twice as long."""
    u = torch.cat([-torch.ones(count), torch.ones(1)]).double()
    retain = torch.eye(count, count + 1, dtype=torch.float64)

    def made_of(*rs: Tensor) -> Tensor:
        if isinstance(rule, Elementwise):
            return rule(u, rs)
        rows = torch.stack([u, *rs])
        return (rule((rows @ rows.T)[None]) @ rows)[0]

    return not torch.allclose(made_of(*retain), made_of(*(2 * retain)), equal_nan=True)


def _overflows(gradients: Gradients) -> bool:
    """Whether a number of a step that was scaled up is not finite on any process."""
    finite = all(
        bool(distributed.local(tensor).isfinite().all())
        for vector in gradients.vectors.values()
        for tensor in vector
        if tensor is not None
    )
    return distributed.anywhere(not finite)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(
            f"`{name}` should be one of {', '.join(valid)}. Found `{name} = {value!r}`. "
            "Choose one of those."
        )


def _fraction(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(
            f"`{name}` of Rectifier should be above 0 and at most 1. Found `{name} = {value!r}`. "
            f"Pass a fraction such as {name}=0.5."
        )
    return float(value)
