"""The rectifier: makes unlearning steps that do not harm what should stay."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from geffect.gradients import (
    Gradients,
    Loss,
    Rectification,
    Vector,
    differentiate,
)
from geffect.layers import describe, trainable
from geffect.sources import OBJECTIVE, RETAIN, RETAIN_EMA

from .elementwise import most_salient, salience
from .memory import RetainMemory
from .rules import Rule, gru
from .scopes import Blocks, rectify_blocks, rectify_coordinates, skipped
from .spaces import GradientSpace, Space, UpdateSpace, around_step

Scope = Literal["model", "layer", "coordinate"]
SpaceName = Literal["gradient", "update"]


class Rectifier:
    """Rectifies the unlearning gradient, or the optimizer's own step, against the retain gradient.

    With the defaults this is GRU (arXiv 2503.09117): where the objective gradient u has a negative
    inner product with the running average r of the retain gradients, its component along r is
    removed. The average weighs the new gradient with `ema`; it starts at the first one.

    - `rule`: from a Gram matrix to weights, such as `geffect.projection.gru`; None for none.
    - `scope`: what one constraint covers: the whole "model", each "layer", or each "coordinate"
      (coordinates that would harm r stay where they are).
    - `space`: "gradient" changes `.grad` before the optimizer steps, as in the paper. "update"
      changes the step that `optimizer` takes, so that the constraint holds for what is applied:
      adaptive optimizers rescale a rectified gradient and break it. The optimizer is not wrapped.
    - `select`: keep only this fraction of the coordinates, those that the objective needs most and
      the retain data least (`geffect.projection.elementwise.salience`); before the rule.

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
        rule: Rule | None = gru,
        *,
        scope: Scope = "model",
        space: SpaceName = "gradient",
        optimizer: torch.optim.Optimizer | None = None,
        ema: float = 0.8,
        select: float | None = None,
    ) -> None:
        _one_of("scope", scope, get_args(Scope))
        _one_of("space", space, get_args(SpaceName))
        if optimizer is not None and space == "gradient":
            raise ValueError(
                '`optimizer` should be given with space="update", which changes its steps. '
                'Found one with space="gradient". Leave it out, or pass space="update".'
            )
        if scope == "coordinate" and rule is not gru:
            raise ValueError(
                'Scope "coordinate" should go with the rule gru, whose closed form it is. '
                f"Found `rule = {rule}`. Choose another scope, or leave the rule out."
            )
        self.skipped = 0
        self.report: Rectification | None = None
        self._parameters = list(trainable(model).values())
        self._blocks = Blocks.of(
            [p.layer if scope == "layer" else "model" for p in describe(model)]
        )
        self._rule, self._scope, self._space, self._select = rule, scope, space, select
        self._memory = RetainMemory(_fraction("ema", ema), second_moment=select is not None)
        if select is not None:
            _fraction("select", select)
        # A generator of its own: the sample must not draw from the training's random numbers.
        self._generator = torch.Generator().manual_seed(0)
        self._usable = False
        self._keep: Vector | None = None
        self._step: UpdateSpace | None = None
        self._armed = False
        self._hooks = self._attach(optimizer) if space == "update" else ()

    @property
    def watched(self) -> Mapping[str, Vector]:
        """The running average of the retain gradient, as the source `retain_ema`."""
        return {RETAIN_EMA: self._memory.average or [None] * len(self._parameters)}

    @property
    def blocks(self) -> tuple[str, ...]:
        """What `report` has a number for: the layers, or the model."""
        return self._blocks.names

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up."""
        return {
            "rule": None if self._rule is None else getattr(self._rule, "__name__", "a callable"),
            "scope": self._scope,
            "space": self._space,
            "ema": self._memory.weight,
            "select": self._select,
        }

    def backward(self, **losses: Loss) -> None:
        """The gradient of `objective` into `.grad`, rectified against that of `retain`.

        Losses are as for `geffect.Recorder.backward`; use that one to record the step too.
        """
        if OBJECTIVE not in losses:
            raise ValueError(
                f"The losses of a rectified step should have one named `{OBJECTIVE}`. Found "
                f"{', '.join(losses) or 'none'}. Pass {OBJECTIVE}=loss."
            )
        gradients = differentiate(self._parameters, losses)
        self.observe(gradients)
        gradients.deposit()
        self.rectify()

    def observe(self, gradients: Gradients) -> None:
        """Take the retain gradient of a step into the running average, before `.grad` is written.

        A step is rectified as a whole, so nothing of an earlier backward may lie in `.grad`.
        """
        if any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            raise ValueError(
                "`.grad` should be empty before a rectified step, which is rectified as a whole. "
                "Found gradients of an earlier backward. Call optimizer.zero_grad() before, or add "
                "the losses of the micro-batches up."
            )
        if RETAIN not in gradients.sources:
            raise ValueError(
                f"The losses of a rectified step should have one named `{RETAIN}`. Found "
                f"{', '.join(gradients.sources)}. Pass {RETAIN}=nll(model, retain_batch)."
            )
        retain = gradients.of(RETAIN)
        if list(map(id, gradients.parameters)) != list(map(id, self._parameters)):
            raise ValueError(
                "The rectifier should be made for the model that is trained. Found gradients of "
                "another one, or of parameters that were frozen or added since. Make it from the "
                "same model."
            )
        self._armed, self._step = False, None  # of an optimizer that raised, or never stepped
        self.report = None
        problem = self._memory.update(retain)
        self._usable = problem is None
        if problem is not None:
            self._skip(f"the retain gradient is {problem}")

    def rectify(self) -> None:
        """Change `.grad` now, or the next step of the optimizer when it is taken."""
        if self._space == "update":
            self._armed = True
        elif self._usable:
            space = GradientSpace(self._parameters)
            self._keep = self._selected(space)
            self._change(space)

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def _attach(self, optimizer: torch.optim.Optimizer | None) -> tuple[Any, ...]:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                '`optimizer` should be a torch optimizer when space="update". '
                f"Found `{type(optimizer).__name__}`. Pass Rectifier(..., optimizer=optimizer)."
            )
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not owned.intersection(map(id, self._parameters)):
            raise ValueError(
                "`optimizer` should step the parameters of `model`. Found one that has none of "
                "them. Make it from model.parameters()."
            )
        return around_step(optimizer, partial(self._before_step, optimizer), self._after_step)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._armed and self._usable:
            self._step = UpdateSpace(self._parameters, optimizer)
            self._keep = self._selected(self._step)

    def _after_step(self) -> None:
        step, self._step, self._armed = self._step, None, False
        if step is None:
            return
        with torch.no_grad():
            try:
                self._change(step)
            except BaseException:
                step.undo()
                raise

    def _selected(self, space: Space) -> Vector | None:
        """The mask of the coordinates to step on, of what moves and has a gradient."""
        if self._select is None:
            return None
        saliences = [
            None if p.grad is None or space.direction(i) is None else salience(p.grad, moment)
            for i, (p, moment) in enumerate(
                zip(self._parameters, self._memory.second_moment(), strict=True)
            )
        ]
        return most_salient(saliences, self._select, self._generator)

    def _change(self, space: Space) -> None:
        average = self._memory.average
        if self._scope == "coordinate":
            report = rectify_coordinates(space, average, self._keep, self._blocks)
        else:
            report = rectify_blocks(space, average, self._keep, self._blocks, self._rule)
        self._keep = None
        self.report = report
        if report is None:
            self._skip("the gradient or the step is not finite")

    def _skip(self, reason: str) -> None:
        self.report = skipped(self.blocks)
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=4,
            )
        self.skipped += 1


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
