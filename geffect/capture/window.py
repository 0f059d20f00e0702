"""The micro-batches of one step: their gradients, into `.grad` and into what is measured."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.fingerprints import Standstill
from geffect.gradients import Gradients, GradientTransform, Vector, reduced, stream
from geffect.layers import trainable
from geffect.losses import Passes, check_no_step_inside
from geffect.objectives import statistics
from geffect.sources import (
    AVERAGE,
    OBJECTIVE,
    RECTIFIED,
    UPDATE,
    average_of,
    check_spelt,
    is_reserved,
)
from geffect.steps import Move, check_shapes
from geffect.store.labels import is_name
from geffect.text import plain

from .collector import Measurement
from .header import Declared
from .left import Left, Leftover
from .recording import Recording
from .rows import Entry


@dataclass(frozen=True)
class Watched:
    """What is recorded of every step: the model, the file, and whether the update is."""

    model: nn.Module
    recording: Recording
    update: bool
    trainable: Mapping[str, Tensor]

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Those of the model that are trained."""
        return self.recording.parameters

    @cached_property
    def shapes(self) -> Sequence[torch.Size]:
        """Those that the parameters had at the first step."""
        return [parameter.shape for parameter in self.parameters]

    def sources(
        self, losses: Collection[str], rectifier: GradientTransform | None
    ) -> tuple[str, ...]:
        """The sources that a step of these losses has."""
        return (*losses, *sources_of(rectifier), *([UPDATE] if self.update else []))

    def check(self, losses: Collection[str], rectifier: GradientTransform | None) -> None:
        """Refuse losses, parameters or a rectifier that no step of the run may have."""
        check_names(losses)
        self._check_trainable()
        known = self.recording.header
        known.check_sources([*losses, *sources_of(rectifier)])
        if rectifier is not None:
            known.check_rectifier(rectifier)

    def check_continued(self) -> None:
        """Refuse to continue a run whose rows have an update, or none, where ours do not."""
        sources = self.recording.header.sources
        if sources and self.update != (UPDATE in sources):
            raise ValueError(
                f"`update` should be {not self.update} to continue the run in "
                f"`{self.recording.path}`, as it was recorded. Found `update = {self.update}`. "
                "Pass the same, or record into another file."
            )

    def _check_trainable(self) -> None:
        """Refuse a model that trains other parameters than at first, or steps in a backward."""
        check_no_step_inside(self.parameters)
        then, now = self.trainable, trainable(self.model)
        changed = sorted(n for n in then.keys() | now.keys() if then.get(n) is not now.get(n))
        if changed:
            raise ValueError(
                "The parameters that require a gradient should stay those of the first step. Found "
                f"{len(changed)} frozen, added or replaced, the first of them {changed[:3]}. "
                "Record what follows into another file, with a new Recorder."
            )
        check_shapes(self.parameters, self.shapes)


@dataclass
class Window:
    """The micro-batches of one step, as far as they have come; then the step, until it is written.

    `captured` says whether it gets a row. Gradients are kept, summed over the micro-batches, for as
    long as a rectifier or the row needs them.
    """

    of: Watched
    number: int
    captured: bool
    declared: Declared
    rectifier: GradientTransform | None
    micro: int = 0
    scaled: bool = False
    gradients: Gradients | None = None
    rectified: Vector | None = None
    still: Standstill | None = None  # from the first micro-batch of several on
    left: Left | None = None  # in `.grad`, by the last micro-batch
    measured: Measurement | None = None
    written: bool = False
    leftover: Leftover | None = None  # in `.grad`, from before the first micro-batch
    weights: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self,
        passes: Passes,
        weights: Mapping[str, Tensor],
        *,
        last: bool,
        settle: distributed.Exchange,
    ) -> None:
        """Run the passes of a micro-batch, into `.grad` unless a rectifier comes first.

        `settle` comes between, and sums up what the processes have.
        """
        if self.captured and self.still is None and not last:
            self.still = Standstill(self.of.parameters)
        self._look_for_leftover()
        self.micro += 1
        self.scaled = passes.order.scale != 1.0
        self._take(passes, last=last, settle=settle)
        # What is asked for with the losses is known now.
        for name, values in weights.items():
            self.weights.setdefault(name, []).append(values.detach().flatten())

    def _take(self, passes: Passes, *, last: bool, settle: distributed.Exchange) -> None:
        if self._streams:
            self._stream(passes, last=last, settle=settle)
            return
        gradients = reduced(
            self.of.model,
            self.of.parameters,
            passes,
            peaks_of=protected(self.declared, self.rectifier),
            exchange=settle,
        )
        if self.rectifier is None:
            # A copy where it is looked at again: `.grad` may be added to, or clipped, before then.
            needed = self.of.update or not last or self.micro > 1
            gradients.deposit(copy=self.captured and needed)
            if not self.captured:
                return
            self.left = Left(self.of.parameters)
        if self.gradients is None:
            self.gradients = gradients
        else:
            self.gradients.add_(gradients)
        if self.rectifier is not None and last:
            self.rectifier.observe(self.gradients)

    @property
    def is_given_up(self) -> bool:
        """Whether `.grad` was cleared since a micro-batch, so that no step will come of it.

        With a rectifier `.grad` is empty until the last, and tells nothing.
        """
        return self.left is not None and self.left.is_cleared

    def goes_on(self, *, last: bool, check: Callable[[Callable[[], object]], object]) -> bool:
        """Whether a further micro-batch, the `last` or not, belongs to it; `check` refuses one."""
        given_up = self.is_given_up

        def refuse() -> None:
            self.check_still(last=given_up or last)
            if not given_up:
                self._check_left()

        check(refuse)
        return not given_up

    def check_still(self, *, last: bool) -> None:
        """Refuse to go on, or to end, where parameters have moved since the first micro-batch."""
        still = self.still
        if still is not None and (still.over if last else still.likely_over):
            raise RuntimeError(
                "The last micro-batch of a step should be passed with accumulate=False, before "
                f"the parameters move. Found them moved after {self.micro} micro-batches with "
                "accumulate=True. Tell the last one, also of a partial window."
            )

    def _check_left(self) -> None:
        """Refuse to go on where `.grad` is no more the sum that the row will be of."""
        gradients = self.gradients
        if self.left is None or gradients is None:
            return
        changed = self.left.changed(lambda: gradients.of(OBJECTIVE), scale=gradients.scale)
        if changed:
            names = [self.of.recording.table[place].name for place in changed[:3]]
            raise RuntimeError(
                "`.grad` should be left alone between the micro-batches of a step: their sum is "
                f"recorded. Found it changed in {len(changed)} parameters, the first of them "
                f"{names}, after {self.micro} micro-batches with accumulate=True. Clip, scale or "
                "clear gradients after the last micro-batch, or weight the losses instead."
            )

    def check_may_end(self) -> None:
        """Refuse a window that ends although its last micro-batch was not said to be the last."""
        if self.rectifier is not None:
            raise RuntimeError(
                "The last micro-batch of a step should be passed with accumulate=False, for its "
                f"gradient to be rectified. Found the end of the step after {self.micro} "
                "micro-batches with accumulate=True. Tell the last one, also of a partial window."
            )
        with distributed.raise_on_all_ranks():
            self.check_still(last=True)

    def take(self, gradients: Gradients, n_micro: int) -> None:
        """Take gradients that are there already, of so many micro-batches."""
        gradients.check_of(self.of.parameters)
        self._look_for_leftover()
        self.micro, self.gradients, self.scaled = n_micro, gradients, gradients.scale != 1.0
        if self.rectifier is None:
            gradients.deposit(copy=self.captured and self.of.update)
        else:
            self.rectifier.observe(gradients)

    def finish(self) -> None:
        """The window is a step: measure what can be measured now, and rectify it."""
        measures = self.captured and self.measured is None and not self.of.update
        rectifier = self.rectifier
        sees = self.captured and rectifier is not None and rectifier.changes_gradient
        if measures and not sees:
            self._measure(None)
        if rectifier is None:
            return
        assert self.gradients is not None
        rectifier.rectify(self.gradients, copy=sees or (self.captured and self.of.update))
        if sees:
            grads = [parameter.grad for parameter in self.of.parameters]
            # Where the row comes later, a copy: what follows may clip them in place.
            self.rectified = [g.clone() if g is not None and self.of.update else g for g in grads]
            if measures:
                self._measure(None)
        if not self.of.update:
            self.gradients = self.rectified = None

    def write(self, move: Move) -> None:
        """Write the row of the step, with what it has moved so far; or write it again."""
        if self.of.update:
            self._measure(move.update)
        measured = self.measured
        assert measured is not None
        put = self.of.recording.amend if self.written else self.of.recording.write
        put(
            Entry(
                self.number,
                measured,
                self.declared,
                lr=move.lr,
                n_micro=self.micro,
                clip_scale=float("nan"),  # whether the loop clips is not seen
                skipped=self.scaled and not bool(measured.gram.isfinite().all()),
                stepped=move.stepped,
                rectifier=self.rectifier,
                optimizer=move.optimizer,
                weights={name: statistics(torch.cat(v)) for name, v in self.weights.items()},
                sources=self.of.sources(self.declared, self.rectifier),
            )
        )
        self.written = True

    @property
    def _streams(self) -> bool:
        """Whether inner products can be taken inside of the last pass, and gradients let go."""
        return (
            self.captured
            and self.rectifier is None
            and not self.of.update
            and not distributed.averages(self.of.model)
            and not distributed.is_in_engine(self.of.parameters[0])
        )

    def _look_for_leftover(self) -> None:
        """Before the first gradient; a rectifier refuses one itself."""
        if self.captured and not self.micro and self.rectifier is None:
            self.leftover = Leftover(self.of.parameters)

    def _stream(self, passes: Passes, *, last: bool, settle: distributed.Exchange) -> None:
        """Run the passes; of a window that goes on, the sums of their vectors are kept."""
        parameters, before, order = self.of.parameters, self.gradients, passes.order
        if before is not None:
            before.check_followed(order.weights)
        collector = self.of.recording.collector(self.number, order.weights)
        sums: dict[str, list[Tensor | None]] = {
            name: [None] * len(parameters) for name in order.names
        }
        earlier = {} if before is None else before.vectors
        is_whole = last and before is None  # this micro-batch is all of the window
        losses: dict[str, float] = {}

        def keep(place: int, tensors: Mapping[str, Tensor | None]) -> None:
            for name, tensor in tensors.items():
                sums[name][place] = tensor

        def settled() -> None:
            """Tell all there is to tell at once, before `.grad` is written."""

            def of_losses() -> Tensor:
                losses.update(passes.losses)
                return torch.tensor([*losses.values()], dtype=torch.float64)

            def exchange(part: distributed.Part) -> Tensor:
                total = settle(lambda: torch.cat([of_losses(), part()]))
                means = (total[: len(losses)] / distributed.world_size()).tolist()
                losses.update(zip(losses, means, strict=True))
                if before is not None:
                    losses.update({n: before.losses[n] + v for n, v in losses.items()})
                return total[len(losses) :]

            if last:
                self.measured = collector.measured(losses, exchange)
            else:
                exchange(lambda: torch.zeros(0, dtype=torch.float64))

        with distributed.gradient_sync(self.of.model):
            stream(
                parameters,
                passes,
                collector.take if last else keep,
                earlier=None if is_whole else earlier,
                settle=settled,
            )
        if last:
            self.gradients = None
        else:
            self.gradients = Gradients(parameters, [], sums, order.weights, losses, order.scale)
            self.left = Left(parameters)

    def _measure(self, update: Vector | None) -> None:
        gradients = self.gradients
        assert gradients is not None
        count = len(self.of.parameters)
        vectors = {name: vector[:count] for name, vector in gradients.vectors.items()}
        own = {} if self.rectifier is None else self.rectifier.watched
        # An average of nothing yet is absent, not zero.
        further = {name: v for name, v in own.items() if any(x is not None for x in v)}
        weights = {**gradients.weights, **{name: {name: 1.0} for name in further}}
        if self.rectified is not None:
            further[RECTIFIED] = self.rectified
            weights[RECTIFIED] = {RECTIFIED: 1 / gradients.scale}
        if update is not None:
            further[UPDATE] = update
            weights[UPDATE] = {UPDATE: 1.0}
        self.measured = self.of.recording.measure(
            self.number,
            {**vectors, **further},
            gradients.losses,
            weights,
        )
        if self.rectifier is None and not self.of.update:
            self.gradients = None


def protected(names: Iterable[str], rectifier: GradientTransform | None) -> list[str]:
    """The losses that a rectifier protects, whose passes training takes too."""
    by_average = {average_of(name): name for name in names}
    averages = () if rectifier is None else rectifier.watched
    return [by_average[average] for average in averages if average in by_average]


def sources_of(rectifier: GradientTransform | None) -> tuple[str, ...]:
    """The sources that a step has by its rectifier."""
    if rectifier is None:
        return ()
    return (*rectifier.watched, *([RECTIFIED] if rectifier.changes_gradient else []))


def check_names(losses: Collection[str]) -> None:
    """Refuse losses without an objective, or with names that others have in a run."""
    reserved = [name for name in losses if is_reserved(name) or not is_name(name)]
    if OBJECTIVE not in losses or reserved:
        raise ValueError(
            f"The losses should have one named `{OBJECTIVE}`, none named `{RECTIFIED}` or "
            f"`{UPDATE}` or ending in `{AVERAGE}`, and no name with a slash, NUL or half a "
            f"character, or of dots alone. Found {', '.join(map(plain, losses)) or 'none'}. "
            'Pass objective=loss, or weights such as objective={"forget": -1.0}.'
        )
    check_spelt("The losses", losses)
