"""From options and averages to what is done to a space: the mask, the rule, the scope."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Rectification
from geffect.steps import moved_by, tensors_of

from .elementwise import Elementwise
from .memory import RetainMemory
from .options import Options
from .portions import step_in_portions
from .scopes import Blocks, Constraint, Coordinates, Mask, Metric, Retain, Terms
from .spaces import Space, UpdateSpace, copied

PendingReport = Callable[[], Rectification]
"""What was done, added up over the processes when it is asked for."""

EPSILON = 1e-8


@dataclass(frozen=True)
class Projector:
    """Changes spaces of these parameters, by what the memory holds at the time.

    With `counts=False` it changes them as if there were no average: what is left is the selection.
    """

    options: Options
    blocks: Blocks
    parameters: Sequence[Tensor]
    memory: RetainMemory
    generator: torch.Generator
    """Not the training's: a sample must not draw from its random numbers."""

    room: dict[int, Tensor] = field(default_factory=dict)
    """Of the copies of the parameters."""

    @property
    def alone(self) -> bool:
        """Whether each process decides for the coordinates that it holds, and asks no other."""
        options = self.options
        alone = options.by_coordinate and options.selection is None and not options.measure_update
        return alone and all(map(distributed.is_sharded, self.parameters))

    def moved(self, optimizer: torch.optim.Optimizer | None) -> dict[int, Tensor]:
        """What the optimizer steps, by the places of the parameters; all, where there is none."""
        everything = dict(enumerate(self.parameters))
        if optimizer is None:
            return everything
        stepped = set(map(id, tensors_of(optimizer)))
        return {i: p for i, p in everything.items() if id(p) in stepped}

    def mask(self, moved: Sequence[Tensor]) -> Mask | None:
        """The coordinates to step on, chosen by the gradients of what moves; None for all."""
        selection, memory = self.options.selection, self.memory
        if selection is None:
            return None
        among = set(map(id, moved))
        grads = [p.grad if id(p) in among else None for p in self.parameters]
        threshold = selection.threshold(grads, memory.scale, self.generator)

        def mask(i: int) -> Tensor | None:
            grad = grads[i]
            if grad is None:
                return None
            scale = memory.scale(i) if selection.needs_second_moment else None
            local = None if scale is None else distributed.local(scale)
            return selection.mask(distributed.local(grad), local, threshold)

        return mask

    def change(self, space: Space, mask: Mask | None, *, counts: bool) -> PendingReport | None:
        """Change the space; None, and nothing changed, where a Gram matrix is not finite."""
        retain = self._retain(counts)
        if self.options.by_coordinate:
            coordinates = self._coordinates()
            for i in range(len(self.parameters)):
                coordinates.change(space, i, retain(i), None if mask is None else mask(i))
            return coordinates.report
        rule = self.options.rule
        assert rule is not None and not isinstance(rule, Elementwise)
        constraint = Constraint(self.blocks, self.parameters, self.options.protect, rule)
        report = constraint.keep(space, Terms(retain, mask, self._metric))
        return None if report is None else lambda: report

    def nothing(self) -> Rectification:
        """The report of a process that changed no coordinate, where the others may have."""
        return self._coordinates().report()

    def step(
        self, optimizer: torch.optim.Optimizer, *, counts: bool
    ) -> tuple[Callable[[], None], PendingReport]:
        """Step with no more than a few tensors' old values in memory, coordinate by coordinate.

        Returns what puts the gradients back where they were hidden from the step to come.
        """
        place = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        coordinates, mask = self._coordinates(), self.mask(moved_by(optimizer))
        retain = self._retain(counts)

        def before(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
            return copied(parameter), None if mask is None else mask(place[id(parameter)])

        def after(parameter: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
            i, (old, kept) = place[id(parameter)], state
            space = UpdateSpace({i: parameter}, {i: old})
            coordinates.change(space, i, retain(i), kept)

        return step_in_portions(optimizer, before, after), coordinates.report

    def _retain(self, counts: bool) -> Retain:
        absent: list[Tensor | None] = [None] * len(self.options.protect)
        return self.memory.retain if counts else lambda i: absent

    def _coordinates(self) -> Coordinates:
        options = self.options
        return Coordinates(self.blocks, self.parameters, options.protect, options.elementwise)

    @property
    def _metric(self) -> Metric | None:
        if self.options.correction == "retain":
            return None

        def scale(i: int) -> Tensor | None:
            root = self.memory.scale(i)
            return None if root is None else distributed.local(root) + EPSILON

        return scale
