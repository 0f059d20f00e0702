"""The graph of a loss: what it starts from, what it shares with others, what runs in it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from geffect import distributed


def accumulates_once(loss: Tensor) -> bool:
    """Whether a pass of the loss is sure to add to each `.grad` once.

    A function written in Python may run a backward pass of its own, as a reentrant checkpoint
    does; those of torch's data parallelism do not.
    """
    return not any(
        isinstance(node, BackwardCFunction)
        and not type(node).__module__.startswith("torch.distributed")
        for node in _nodes(loss)
    )


def is_compiled(loss: Tensor) -> bool:
    """Whether a compiled function is in the graph, which may give its memory away in a pass."""
    return any(type(node).__name__ == "CompiledFunctionBackward" for node in _nodes(loss))


def loses_gradient(loss: Tensor) -> bool:
    """Whether an operation without a derivative is in the graph, behind which gradients end.

    torch warns of it in the backward pass, and goes on.
    """
    return any(node.name() == "torch::autograd::WarnNotImplemented" for node in _nodes(loss))


def reaches(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether one of the parameters is in the graph of a loss, as far as that can be told."""
    # FSDP2 has stand-ins for its parameters in the graph, a reentrant checkpoint has none.
    if any(map(distributed.is_sharded, parameters)) or not accumulates_once(loss):
        return True
    known = set(map(id, parameters))
    return any(id(node.variable) in known for node in _nodes(loss) if _is_leaf(node))


def needed_later_of(losses: Sequence[Tensor]) -> list[bool]:
    """For each loss, whether a later one shares a part of its graph that is not a leaf."""
    graphs = [{node for node in _nodes(loss) if not _is_leaf(node)} for loss in losses]
    return [
        any(not graph.isdisjoint(later) for later in graphs[i + 1 :])
        for i, graph in enumerate(graphs)
    ]


def other_leaves(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graphs that are none of the parameters, and that no engine trains."""
    known = set(map(id, parameters))
    leaves = [node.variable for loss in losses for node in _nodes(loss) if _is_leaf(node)]
    found = {id(leaf): leaf for leaf in leaves}
    return [
        leaf
        for place, leaf in found.items()
        if place not in known and not distributed.is_in_engine(leaf)
    ]


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(successor for successor, _ in node.next_functions)


def _is_leaf(node: Any) -> bool:
    # AccumulateGrad, which saves nothing that a backward pass could free.
    return hasattr(node, "variable")
