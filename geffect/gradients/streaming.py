"""The gradients of one step, each parameter's shown once: one less in memory than there are."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from geffect.hooks import Hooks
from geffect.interrupts import put_back_after
from geffect.losses import Graph, Passes
from geffect.sources import OBJECTIVE

from .running import Running
from .vectors import add_to_grads, added, weighted_sum

Visit = Callable[[int, Mapping[str, Tensor | None]], None]
"""Called with the place of a parameter and the tensors that the passes left for it, by name."""


def stream(
    parameters: Sequence[Tensor],
    passes: Passes,
    visit: Visit,
    *,
    earlier: dict[str, list[Tensor | None]] | None = None,
    settle: Callable[[], object] | None = None,
) -> None:
    """Run the passes, show each parameter's gradients once, and leave the objective's in `.grad`.

    The last pass never has a gradient of its own in memory: each of its tensors is shown as soon as
    it is there, and what is not part of the objective is let go. So two losses need the memory of
    one gradient, and k need that of k - 1. A pass that may add to `.grad` more than once is shown
    after its end. Needs that `.grad` is what the optimizer will see: under data parallelism it is
    not averaged yet when it is shown.

    With `earlier`, the sums of the vectors over earlier micro-batches, the sums up to this one are
    shown in their place, which are let go here and belong to whom they are shown. What the
    objective does not need is added to them by its pass: it has no other tensors.

    Whether `.grad` may be written is known after `settle`, which reads the losses.
    """
    streamed = _Streamed(parameters, passes, visit, earlier)
    streamed.run()
    (settle or passes.values.read)()  # what is not finite is known before `.grad` is written
    add_to_grads(passes.leaves, streamed.objective.get)


class _Streamed:
    """The passes of a step while they are shown."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        passes: Passes,
        visit: Visit,
        earlier: dict[str, list[Tensor | None]] | None,
    ) -> None:
        self.objective: dict[int, Tensor | None] = {}  # by the place of a leaf that was taken
        self._parameters, self._passes, self._visit = parameters, passes, visit
        weights, scale = passes.order.weights[OBJECTIVE], passes.order.scale
        self._terms = {name: weight * scale for name, weight in weights.items()}
        self._running = Running(passes)
        self._resident: dict[str, list[Tensor | None]] = {}
        self._adds_up, self._sums = earlier is not None, earlier or {}

    def run(self) -> None:
        """Run the passes, and show each parameter's gradients."""
        self._running.each(self._run)

    def _run(self, name: str) -> None:
        into = [] if name in self._terms else self._sums.pop(name, [])
        if name != self._passes.order.last:
            self._resident[name] = self._running.left_by(name, into=into)
            return
        hooks = Hooks()

        def watch(graph: Graph) -> None:
            if graph.accumulates_once:
                for place, leaf in enumerate(self._parameters):
                    hook = partial(self._take, place=place)
                    hooks.add(leaf.register_post_accumulate_grad_hook, hook)

        put_back_after(lambda: self._running.left_by(name, into=into, before=watch), hooks.remove)
        for place, leaf in enumerate(self._passes.leaves):
            if place not in self.objective:  # what the last loss does not reach, and the others
                self._take(leaf, place)

    def _take(self, leaf: Tensor, place: int) -> None:
        """Show the gradients of a leaf, the last of which has just come into its `.grad`."""
        if place in self.objective:
            raise RuntimeError(
                "A backward pass should add to each `.grad` once. Found a second time for a "
                f"parameter of shape {tuple(leaf.shape)}. Record with update=True, which takes "
                "the gradients after the pass."
            )
        tensors = {name: _taken(vector, place) for name, vector in self._resident.items()}
        tensors[self._passes.order.last], leaf.grad = leaf.grad, None
        if place < len(self._parameters):
            names = self._passes.order.names
            self._visit(place, {name: self._summed(place, name, tensors[name]) for name in names})
        terms = [(tensors[name], weight) for name, weight in self._terms.items()]
        self.objective[place] = weighted_sum(terms)

    def _summed(self, place: int, name: str, tensor: Tensor | None) -> Tensor | None:
        """The tensor with those of earlier micro-batches, if it has not been added to them."""
        if not self._adds_up or name not in self._terms:
            return tensor
        total = _taken(self._sums.get(name, []), place)
        if total is None:
            return None if tensor is None else tensor.clone()
        return total if tensor is None else added(total, tensor, in_place=True)


def _taken(vector: list[Tensor | None], place: int) -> Tensor | None:
    """The tensor of a place, taken out of the vector; None where it has no such place."""
    if place >= len(vector):
        return None
    tensor, vector[place] = vector[place], None
    return tensor
