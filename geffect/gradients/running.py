"""The backward passes of a step, one after the other, and nothing else changed.

The primitive is to put `.grad` aside, run a real `.backward()`, and take what it leaves:
`torch.autograd.grad` would bypass the hooks that data-parallel and sharded training live on.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor

from geffect.beside import beside
from geffect.interrupts import put_back_after
from geffect.losses import Graph, Passes


class Running:
    """The passes of a step while they run, and what lay in `.grad` before."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._before: list[tuple[Tensor, Tensor | None]] = []  # of leaves, once they are known

    def each(self, take: Callable[[str], None]) -> None:
        """Call with the name of each pass in order, those aside without a trace in the model.

        What stood in `.grad` stands there again afterwards.
        """
        put_back_after(lambda: self._in_order(take), self._put_back)

    def left_by(
        self,
        name: str,
        *,
        into: Sequence[Tensor | None] = (),
        before: Callable[[Graph], None] = lambda graph: None,
    ) -> list[Tensor | None]:
        """What a pass leaves, added to the tensors of `into`; `before` gets its loss's graph."""
        passes = self._passes
        self._clear()
        graph = passes.ask(name)
        self._clear()
        for parameter, tensor in zip(passes.parameters, into, strict=False):
            parameter.grad = tensor
        before(graph)
        passes.run(name, graph)
        return [leaf.grad for leaf in passes.leaves]

    def _in_order(self, take: Callable[[str], None]) -> None:
        order, elsewhere, model = self._passes.order, self._passes.elsewhere, self._passes.model
        if order.moved:
            assert elsewhere is not None
            with elsewhere.block():
                for name in order.moved:
                    take(name)
        for name in order.given:
            if name not in order.aside and name not in order.moved:
                take(name)
        if order.aside:
            with nullcontext() if model is None else beside(model):
                for name in order.aside:
                    take(name)

    def _clear(self) -> None:
        """Nothing lies in the `.grad` of any leaf that is known."""
        leaves = self._passes.leaves
        for leaf in leaves[len(self._before) :]:
            self._before.append((leaf, leaf.grad))
        for leaf in leaves:
            leaf.grad = None

    def _put_back(self) -> None:
        for leaf, grad in self._before:
            leaf.grad = grad
