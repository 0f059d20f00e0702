"""From options and averages to what is done to a space: the mask, the rule, the scope."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Rectification
from geffect.optimizers import at_rest_in, tensors_of

from . import fused
from .blocks import Blocks, held
from .constraint import Change, Constraint, Metric, PendingRectification, Retain, Terms
from .coordinates import Coordinates
from .elementwise import Elementwise
from .masks import Mask, Masks
from .memory import RetainMemory
from .options import Correction, Options
from .portions import PORTION_BYTES, StepInPortions
from .selection import Roots
from .spaces import Space, UpdateSpace, copied, widened

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

    earlier: dict[int, Tensor] = field(default_factory=dict)
    """The masks of the step before, of a selection that tells what it keeps."""

    @property
    def alone(self) -> bool:
        """Whether each process decides for the coordinates that it holds, and asks no other."""
        options = self.options
        alone = options.by_coordinate and options.selection is None and not options.measure_update
        return alone and all(map(distributed.is_sharded, self.parameters))

    @property
    def differs(self) -> bool:
        """Whether a process sees other numbers than the others, and asks them.

        Gradients that are averaged are the same everywhere.
        """
        return not self.alone and any(map(distributed.is_sharded, self.parameters))

    def held(self, optimizer: torch.optim.Optimizer | None) -> dict[int, Tensor]:
        """What the optimizer holds, by the indices of the parameters; all, where there is none."""
        everything = dict(enumerate(self.parameters))
        if optimizer is None:
            return everything
        own = set(map(id, tensors_of(optimizer)))
        return {i: p for i, p in everything.items() if id(p) in own}

    def moved(self, optimizer: torch.optim.Optimizer | None) -> dict[int, Tensor]:
        """Of these what it steps: not what has no learning rate where the rest has one."""
        resting = set() if optimizer is None else set(map(id, at_rest_in(optimizer)))
        return {i: p for i, p in self.held(optimizer).items() if id(p) not in resting}

    def mask(self, moved: Sequence[Tensor]) -> Mask | None:
        """The coordinates to step on, chosen by the gradients of what moves; None for all."""
        selection, memory = self.options.selection, self.memory
        if selection is None:
            return None
        among = set(map(id, moved))
        grads = [
            distributed.laid_out_like(p.grad, p) if id(p) in among and p.grad is not None else None
            for p in self.parameters
        ]
        roots = memory.roots if selection.needs_second_moment else Roots.none()
        threshold = selection.threshold(grads, roots, self.generator)

        def mask(i: int) -> Tensor | None:
            whole = grads[i]
            if whole is None:
                return None
            grad, square = distributed.local(whole), held([roots.squares(i)])[0]
            if selection.epsilon is not None:
                found = fused.salient(grad, square, roots.share, threshold, selection.epsilon)
                if found is not None:
                    return found
            return selection.mask(grad, roots.root(square), threshold)

        return mask

    def masks(self) -> Masks | None:
        """What counts the masks of a step; None where the selection does not tell of them."""
        selection = self.options.selection
        if selection is None or not selection.is_told:
            return None
        return Masks(self.blocks, self.parameters, dict(self.earlier))

    def change(
        self,
        space: Space,
        mask: Mask | None,
        *,
        counts: bool,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Change | None:
        """What is to be done to the space; None where a Gram matrix is not finite.

        `optimizer` is the one whose step the space is.
        """
        retain = self._retain(counts)
        if self.options.by_coordinate:
            coordinates = self._coordinates()
            indices = range(len(self.parameters))
            make = partial(_change_each, coordinates, space, indices, retain=retain, mask=mask)
            return Change(make, coordinates.report)
        rule = self.options.rule
        assert rule is not None and not isinstance(rule, Elementwise)
        options = self.options
        constraint = Constraint(
            self.blocks, self.parameters, options.protect, rule, count=options.constraints
        )
        metric = METRICS[options.correction](self, optimizer)
        return constraint.planned(space, Terms(retain, mask, metric))

    def drawn(self) -> Callable[[], None]:
        """What takes back the random numbers that a selection draws from now on."""
        if self.options.selection is None:
            return lambda: None
        state = self.generator.get_state()

        def take_back() -> None:
            self.generator.set_state(state)

        return take_back

    def nothing(self) -> Rectification:
        """The report of a process that changed no coordinate, where the others may have."""
        return self._coordinates().report()

    def in_portions(
        self, optimizer: torch.optim.Optimizer, mask: Mask | None, *, counts: bool
    ) -> tuple[StepInPortions, PendingRectification]:
        """A step with the old values of a few tensors in memory, coordinate by coordinate."""
        index = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        coordinates, retain = self._coordinates(), self._retain(counts)

        def begin(tensors: Sequence[Tensor]) -> FewTensors:
            own = {index[id(tensor)]: tensor for tensor in tensors}
            space = UpdateSpace(own, {i: copied(tensor) for i, tensor in own.items()})
            masks = None if mask is None else {i: mask(i) for i in own}.__getitem__
            make = partial(_change_each, coordinates, space, own, retain=retain, mask=masks)
            return FewTensors(make, space.undo)

        step = StepInPortions(optimizer, begin, portion_bytes=PORTION_BYTES)
        return step, coordinates.report

    def _retain(self, counts: bool) -> Retain:
        absent: list[Tensor | None] = [None] * self.options.constraints
        return self.memory.retain if counts else lambda i: absent

    def _coordinates(self) -> Coordinates:
        options = self.options
        return Coordinates(
            self.blocks,
            self.parameters,
            options.protect,
            options.elementwise,
            count=options.constraints,
        )


def metric_of_average(projector: Projector, _: torch.optim.Optimizer | None) -> Metric:
    """sqrt(v) + eps of each parameter, v the average of squares that the memory holds."""

    def scale(i: int) -> Tensor | None:
        root = projector.memory.scale(i)
        return None if root is None else distributed.local(root) + EPSILON

    return scale


def metric_of_adam(projector: Projector, optimizer: torch.optim.Optimizer | None) -> Metric:
    """sqrt(v) + eps of each parameter, v the second moment that the optimizer has by now."""
    assert optimizer is not None
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def scale(i: int) -> Tensor | None:
        parameter = projector.parameters[i]
        known, group = optimizer.state.get(parameter, {}), groups.get(id(parameter), {})
        square = known.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        return None if square is None else widened(distributed.local(square)).sqrt() + group["eps"]

    return scale


METRICS: Mapping[Correction, Callable[[Projector, torch.optim.Optimizer | None], Metric | None]] = {
    "retain": lambda *_: None,
    "retain_adam": metric_of_average,
    "adam": metric_of_adam,
}
"""The metric in which a multiple of r is added, by the correction; None for that of the space."""


@dataclass(frozen=True)
class FewTensors:
    """A portion of a step: each of its coordinates is changed by itself."""

    finish: Callable[[], None]
    undo: Callable[[], None]


def _change_each(
    coordinates: Coordinates,
    space: Space,
    indices: Iterable[int],
    *,
    retain: Retain,
    mask: Mask | None,
) -> None:
    space.begin()
    for i in indices:
        coordinates.change(space, i, retain(i), None if mask is None else mask(i))
