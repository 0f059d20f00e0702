"""From options and averages to what is done to a space: the mask, the rule, the scope."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Rectification
from geffect.steps import moved_by

from .elementwise import Elementwise
from .memory import RetainMemory
from .options import Options
from .scopes import Blocks, Constraint, Coordinates, Mask, Metric
from .spaces import Space, UpdateSpace, copied, step_in_portions

PendingReport = Callable[[], Rectification]
"""What was done, added up over the processes when it is asked for."""

EPSILON = 1e-8


class Projector:
    """Changes spaces of these parameters, by what the memory holds at the time."""

    def __init__(
        self,
        options: Options,
        blocks: Blocks,
        parameters: Sequence[Tensor],
        memory: RetainMemory,
        generator: torch.Generator,
    ) -> None:
        self._options, self._blocks = options, blocks
        self._parameters, self._memory = parameters, memory
        # Not the training's: a sample must not draw from its random numbers.
        self._generator = generator

    def mask(self, moved: Sequence[Tensor]) -> Mask | None:
        """The coordinates to step on, chosen by the gradients of what moves; None for all."""
        selection, memory = self._options.selection, self._memory
        if selection is None:
            return None
        among = set(map(id, moved))
        grads = [p.grad if id(p) in among else None for p in self._parameters]
        threshold = selection.threshold(grads, memory.scale, self._generator)

        def mask(i: int) -> Tensor | None:
            grad = grads[i]
            if grad is None:
                return None
            scale = memory.scale(i) if selection.needs_second_moment else None
            local = None if scale is None else distributed.local(scale)
            return selection.mask(distributed.local(grad), local, threshold)

        return mask

    def change(self, space: Space, mask: Mask | None) -> PendingReport | None:
        """Change the space; None, and nothing changed, where a Gram matrix is not finite."""
        if self._options.by_coordinate:
            coordinates = self._coordinates()
            for i in range(len(self._parameters)):
                kept = None if mask is None else mask(i)
                coordinates.change(space, i, self._memory.retain(i), kept)
            return coordinates.report
        rule = self._options.rule
        assert rule is not None and not isinstance(rule, Elementwise)
        constraint = Constraint(self._blocks, self._parameters, self._options.protect, rule)
        report = constraint.keep(space, self._memory.retain, mask, self._metric)
        return None if report is None else lambda: report

    def nothing(self) -> Rectification:
        """The report of a process that changed no coordinate, where the others may have."""
        return self._coordinates().report()

    def step(self, optimizer: torch.optim.Optimizer) -> tuple[Callable[[], None], PendingReport]:
        """Step with no more than a few tensors' old values in memory, coordinate by coordinate.

        Returns what puts the gradients back where they were hidden from the step to come.
        """
        place = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        coordinates, mask = self._coordinates(), self.mask(moved_by(optimizer))

        def before(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
            return copied(parameter), None if mask is None else mask(place[id(parameter)])

        def after(parameter: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
            i, (old, kept) = place[id(parameter)], state
            space = UpdateSpace({i: parameter}, {i: old})
            coordinates.change(space, i, self._memory.retain(i), kept)

        return step_in_portions(optimizer, before, after), coordinates.report

    def _coordinates(self) -> Coordinates:
        options = self._options
        return Coordinates(self._blocks, self._parameters, options.protect, options.elementwise)

    @property
    def _metric(self) -> Metric | None:
        if self._options.correction == "retain":
            return None

        def scale(i: int) -> Tensor | None:
            root = self._memory.scale(i)
            return None if root is None else distributed.local(root) + EPSILON

        return scale
