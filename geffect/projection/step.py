"""One step: from the retain gradients that it takes in to the update that was applied."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Gradients, Rectification, Vector, peak
from geffect.interrupts import to_the_end
from geffect.optimizers import check_owned, moved_by

from .blocks import GramAccumulator, block_names, held, parts
from .constraint import Change, PendingRectification
from .graphless import without_graph
from .masks import Mask, Masks
from .notices import Notices
from .portions import StepInPortions, steps_tensor_by_tensor
from .projector import Projector
from .reports import skipped, with_masks, without_retain
from .spaces import GradientSpace, UpdateSpace


class RectifiedStep:
    """What is known of a step, as far as it has come.

    Its order: `take_in` the retain gradients, `change` the gradient of the objective in `.grad`,
    and `before` and `after` the optimizer steps, where it is `armed`. A step whose retain gradients
    do not count is not rectified; a selection of coordinates holds all the same.
    """

    def __init__(self, projector: Projector, notices: Notices) -> None:
        self._projector, self._notices = projector, notices
        self.armed = False  # whether the optimizer's step is to be changed or looked at
        self._scale = 1.0  # of a GradScaler
        self._counts = False  # whether its retain gradients are in the averages
        self._is_skipped = self._overflowed = False
        self._fresh: list[Vector] = []
        self._ahead: Whole | None = None
        self._taken: StepInPortions | None = None  # where it is taken here
        self._report: PendingRectification | None = None
        self._applied: GramAccumulator | None = None
        self._masks: Masks | None = None

    @property
    def promises(self) -> bool:
        """Whether a step will come, and something of it is promised."""
        options = self._projector.options
        return not self._overflowed and (options.changes_gradient or options.changes_step)

    @property
    def changes_step(self) -> bool:
        """Whether the optimizer's step is to be changed, not looked at alone."""
        return self.armed and self._projector.options.changes_step

    def take_in(self, gradients: Gradients) -> None:
        """Take the retain gradients into the averages, where they count."""
        self._scale = gradients.scale
        self._overflowed = self._scale != 1.0 and _overflows(gradients)
        if self._overflowed:
            return  # the GradScaler skips this step, as if it had not been
        projector = self._projector
        retain = {name: gradients.of(name) for name in projector.options.protect}
        problem = projector.memory.update(
            retain, agree=not projector.alone, peaks=self._peaks(gradients, retain)
        )
        self._counts = problem is None
        if problem is not None:
            self._skip(f"the retain gradient is {problem}")
        elif projector.options.measure_update:
            self._fresh = [*retain.values()]

    def change(self, gradients: Gradients, moved: Mapping[int, Tensor], *, copy: bool) -> None:
        """Leave the objective's gradient in `.grad`, and rectify it there, or arm the step.

        `moved` is what the optimizer steps, by the indices of the parameters; nothing lies in their
        `.grad`. What is not to be rectified of the objective is added behind. Whatever raises
        leaves all as it was.
        """
        options = self._projector.options
        copy = copy or options.measure_update
        of_retain = [gradients.weights.get(name, {}) for name in options.protect]
        behind = {n for terms in of_retain for n in terms} if options.part == "forget" else set()
        put_back = self._puts_back(gradients, moved)
        try:
            gradients.deposit(among=gradients.vectors.keys() - behind, copy=copy)
            self._rectify(moved)
            if behind and not options.adds_retain:
                gradients.deposit(among=behind, copy=copy)
            if not self.armed:
                self._remember()
        except BaseException:
            to_the_end(put_back)
            raise

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare for the optimizer's step, or take it; what raises before that changes nothing."""
        if not self.armed or (self._taken is not None and self._taken.over):
            return
        projector, options = self._projector, self._projector.options
        check_owned(optimizer, projector.parameters)
        changes = options.space == "update"
        self._taken = self._ahead = None
        drawn = projector.drawn()
        try:
            mask = self._mask(moved_by(optimizer)) if changes else None
            if changes and steps_tensor_by_tensor(optimizer):
                self._taken = self._in_portions(optimizer, mask)
                self._taken.take()
                self._remember()
            else:
                self._ahead = self._whole(optimizer, mask)
        except BaseException:
            if self._taken is None or not self._taken.over:
                drawn()
            raise

    def after(self) -> None:
        """Change what the optimizer has made of the step, if it was not taken here."""
        ahead = self._ahead
        if ahead is not None:
            finish = partial(without_graph, ahead.finish)
            try:
                to_the_end(finish)
            except BaseException:
                if not ahead.over:
                    # The interrupt came before the first line of what waits for it, or it fails.
                    with suppress(Exception):
                        to_the_end(finish)
                if not ahead.over:
                    without_graph(lambda: to_the_end(ahead.undo))
                raise
            self._remember()
        self.abandon()

    def abandon(self) -> None:
        """Leave the optimizer's step alone: it has ended, or raised, or will not be taken."""
        self.armed, self._ahead = False, None
        if self._taken is not None:
            to_the_end(self._taken.put_back)
            self._taken = None

    @property
    def report(self) -> Rectification | None:
        """What was done; None where there was nothing to do."""
        if self._report is None:
            return None
        report = self._report()
        if self._applied is not None:
            products = self._applied.by_block()[:, 0, 1:]
            count = len(self._projector.options.protect)
            report = replace(
                report,
                applied_average=tuple(products[:, :count].flatten().tolist()),
                applied_fresh=tuple(products[:, count:].flatten().tolist()),
            )
        self._report, self._applied = (lambda: report), None
        return report

    def _rectify(self, moved: Mapping[int, Tensor]) -> None:
        if self._overflowed:
            _tell_scaler(moved.values())
            return
        options = self._projector.options
        if self._counts and self._projector.memory.compares:
            self._compare(moved)
        acts = self._counts or options.selection is not None
        if acts and options.by_coordinate and not self._peak(moved) < float("inf"):
            # No Gram matrix tells.
            self._counts = acts = False
            self._skip("the gradient of the objective is not finite")
        changes_update = acts and options.space == "update"
        self.armed = changes_update or (self._counts and options.measure_update)
        if acts and options.space == "gradient":
            without_graph(lambda: self._change_gradient(moved))

    def _change_gradient(self, moved: Mapping[int, Tensor]) -> None:
        if self._projector.options.adds_retain and self._counts:
            self._make_room(moved)
        mask = self._mask([*moved.values()])
        space = GradientSpace(moved, self._scale)
        change = self._projector.change(space, mask, counts=self._counts)
        if change is not None:
            change.make()
        self._done(change)

    def _mask(self, moved: Sequence[Tensor]) -> Mask | None:
        """The coordinates to step on, counted where the selection tells of them."""
        mask, self._masks = self._projector.mask(moved), self._projector.masks()
        return mask if mask is None or self._masks is None else self._masks.of(mask)

    def _remember(self) -> None:
        """The step is made: its masks are what those of the next one are held against."""
        if self._masks is not None:
            self._projector.earlier.clear()
            self._projector.earlier.update(self._masks.kept)

    def _compare(self, moved: Mapping[int, Tensor]) -> None:
        problem = self._projector.memory.compare(self._peak(moved) / self._scale)
        if problem is not None:
            self._counts, self._fresh = False, []
            self._skip(f"the retain gradient is {problem}")

    def _peak(self, moved: Mapping[int, Tensor]) -> float:
        """The largest coordinate of the objective's gradient."""
        largest = peak(parameter.grad for parameter in moved.values())
        return distributed.max_over_ranks(largest) if self._projector.differs else largest

    def _peaks(self, gradients: Gradients, retain: Mapping[str, Vector]) -> Mapping[str, float]:
        """The largest coordinates of retain gradients that no other process need be asked for."""
        if self._projector.alone:
            return {}  # what is not finite is left out where it is
        known = gradients.peaks
        asked = () if self._projector.differs else retain.keys() - known.keys()
        return {**known, **{name: peak(retain[name]) for name in asked}}

    def _make_room(self, moved: Mapping[int, Tensor]) -> None:
        """A gradient, of zero, where only the retain data have one to be added."""
        for i, parameter in moved.items():
            retain = self._projector.memory.retain(i)
            if parameter.grad is None and any(r is not None for r in retain):
                parameter.grad = torch.zeros_like(parameter)

    def _in_portions(self, optimizer: torch.optim.Optimizer, mask: Mask | None) -> StepInPortions:
        """The step, to be taken in portions where nothing needs all of it at once."""
        projector, options = self._projector, self._projector.options
        # What is somebody else's may raise, and then all of the step is taken back.
        if options.by_coordinate and options.is_ours and not options.measure_update:
            step, report = projector.in_portions(optimizer, mask, counts=self._counts)
            self._report = self._told(report)
            return step
        return StepInPortions(
            optimizer, lambda _: self._whole(optimizer, mask), portion_bytes=math.inf
        )

    def _whole(self, optimizer: torch.optim.Optimizer, mask: Mask | None) -> "Whole":
        """All of the step, which is about to be taken."""
        projector = self._projector
        # Now, as optimizers may use the memory of a gradient for their own ends.
        masks = None if mask is None else [*map(mask, range(len(projector.parameters)))]
        space = UpdateSpace.ahead_of(optimizer, projector.parameters, projector.room)
        changes = projector.options.space == "update"

        def plan() -> Change | None:
            kept = None if masks is None else masks.__getitem__
            change = projector.change(space, kept, counts=self._counts, optimizer=optimizer)
            self._done(change)
            return change

        def measure() -> None:
            if self._fresh:
                self._measure(space)

        return Whole(plan if changes else lambda: None, measure, space.undo)

    def _puts_back(self, gradients: Gradients, moved: Mapping[int, Tensor]) -> Callable[[], None]:
        """What makes all that `change` writes what it is now."""
        leaves = [*gradients.parameters, *gradients.others]
        empty = set(map(id, moved.values()))
        grads = [
            (leaf, leaf.grad, None if id(leaf) in empty or leaf.grad is None else leaf.grad.clone())
            for leaf in leaves
        ]
        memory = self._projector.memory.mark()
        drawn, skipped = self._projector.drawn(), self._notices.skipped

        def put_back() -> None:
            for leaf, grad, values in grads:
                leaf.grad = grad
                if grad is not None:
                    kept = grad.detach()
                    kept.zero_() if values is None else kept.copy_(values)
            memory()
            drawn()
            self._notices.skipped = skipped
            self.armed = False

        return put_back

    def _measure(self, update: UpdateSpace) -> None:
        """Take the inner products of the step that was applied."""
        projector = self._projector
        sets = len(projector.options.protect)
        size = 1 + 2 * sets
        tally = GramAccumulator(projector.blocks, projector.parameters, size)
        for i in range(len(projector.parameters)):
            average = projector.memory.retain(i)[:sets]
            others = held([*average, *(vector[i] for vector in self._fresh)])
            for part, where in enumerate(update.parts(i)):
                tally.add(i, part, [update.direction(i, where), *parts(others, where)])
        self._applied = tally

    def _done(self, change: Change | None) -> None:
        if change is None:
            self._skip("the gradient or the step is not finite")
            self._masks = None
            return
        self._report = self._told(change.report)
        if change.unmet is not None:
            self._notices.unmet(change.unmet)

    def _told(self, report: PendingRectification) -> PendingRectification:
        masks, sets = self._masks, len(self._projector.options.protect)

        def told() -> Rectification:
            found = report() if self._counts else without_retain(report())
            return found if masks is None else with_masks(found, masks, sets)

        return told

    def _skip(self, reason: str) -> None:
        if self._is_skipped:
            return
        self._is_skipped = True
        nothing = skipped(block_names(self._projector.blocks, self._projector.options.protect))
        # Where each decides alone, the others add up what they did: nothing is this one's share.
        self._report = self._projector.nothing if self._projector.alone else lambda: nothing
        self._notices.skip(reason)


class Whole:
    """All of a step that an optimizer takes: how it is to be changed, and looked at afterwards."""

    def __init__(
        self,
        plan: Callable[[], Change | None],
        measure: Callable[[], None],
        undo: Callable[[], None],
    ) -> None:
        self.over = False
        self.undo = undo
        self._plan, self._measure = plan, measure
        self._asked = False
        self._change: tuple[Change | None] | None = None

    def finish(self) -> None:
        """Change and measure it; called anew after an interrupt."""
        if self._change is None:
            if self._asked and distributed.world_size() > 1:
                self.undo()  # the other processes do not come here again
                self.over = True
                return
            self._asked = True
            self._change = (self._plan(),)
        (change,) = self._change
        if change is not None:
            change.make()
        self._measure()
        self.over = True


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
