"""The graph of a loss: what it starts from, what it shares with others, what runs in it."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from geffect import distributed


@dataclass(frozen=True)
class Graph:
    """What one walk over the graph of a loss has found. It lives as long as the loss.

    - `leaves`: the tensors that it starts from, by their ids.
    - `operations`: its nodes but for those of leaves, which save nothing that a pass could free.
    - `accumulates_once`: whether a pass is sure to add to each `.grad` once. A function written in
      Python may run a backward pass of its own, as a reentrant checkpoint does; those of torch's
      data parallelism do not.
    - `is_compiled`: whether a function in it may give its memory away in a pass.
    - `loses_gradient`: whether an operation without a derivative is in it, behind which gradients
      end. torch warns of it in the backward pass, and goes on.
    """

    loss: Tensor
    leaves: dict[int, Tensor]
    operations: AbstractSet[Any]
    accumulates_once: bool
    is_compiled: bool
    loses_gradient: bool

    @classmethod
    def of(cls, loss: Tensor) -> "Graph":
        """Walk over the graph of a loss."""
        nodes = _nodes(loss)
        kinds = {type(node) for node in nodes}
        of_leaves = {kind for kind in kinds if hasattr(kind, "variable")}  # AccumulateGrad
        starts = [node for node in nodes if type(node) in of_leaves]
        return cls(
            loss,
            leaves={id(leaf): leaf for leaf in (node.variable for node in starts)},
            operations=nodes.keys() - set(starts),
            accumulates_once=not any(map(_may_run_a_pass, kinds)),
            is_compiled=any(kind.__name__ == "CompiledFunctionBackward" for kind in kinds),
            loses_gradient=any(
                node.name() == "torch::autograd::WarnNotImplemented" for node in nodes
            ),
        )

    def reaches(self, parameters: Sequence[Tensor]) -> bool:
        """Whether one of the parameters is among the leaves, as far as that can be told."""
        # FSDP2 has stand-ins for its parameters in the graph, a reentrant checkpoint has none.
        if any(map(distributed.is_sharded, parameters)) or not self.accumulates_once:
            return True
        return not self.leaves.keys().isdisjoint(map(id, parameters))

    def shares_with(self, others: Iterable["Graph"]) -> bool:
        """Whether one of the others has an operation in common with it."""
        return any(not self.operations.isdisjoint(other.operations) for other in others)


def other_leaves(graphs: Iterable[Graph], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graphs that are none of the parameters, and that no engine trains."""
    known = set(map(id, parameters))
    found = {place: leaf for graph in graphs for place, leaf in graph.leaves.items()}
    return [
        leaf
        for place, leaf in found.items()
        if place not in known and not distributed.is_in_engine(leaf)
    ]


def _nodes(loss: Tensor) -> dict[Any, None]:
    """The nodes behind a loss, in the order in which a walk comes to them."""
    found: dict[Any, None] = {}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack += [following for following, _ in node.next_functions]
    return found


def _may_run_a_pass(kind: type) -> bool:
    within_torch = kind.__module__.startswith("torch.distributed")
    return issubclass(kind, BackwardCFunction) and not within_torch
