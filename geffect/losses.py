"""The losses of a step: the backward passes they need, and what each is in terms of these."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.autograd.function import BackwardCFunction

from geffect import distributed
from geffect.sources import OBJECTIVE

Loss = Tensor | Mapping[str, float]
"""A scalar with a graph, or weights that declare a linear combination of such scalars."""


@dataclass(frozen=True)
class Passes:
    """The backward passes of a step: one for each different tensor among its losses.

    `weights` gives every source as a combination of what the passes leave in `.grad`, so that a
    declared combination costs no pass. `leaves` are what the graphs start from: the parameters, and
    after them anything else, such as a soft prompt, which must not collect every pass either.
    """

    tensors: Mapping[str, Tensor]
    leaves: Sequence[Tensor]
    weights: Mapping[str, Mapping[str, float]]
    losses: Mapping[str, float]
    seeds: Mapping[str, float]
    keeps_graph: Mapping[str, bool]
    scale: float = 1.0  # of a GradScaler, by which all gradients come out multiplied
    around: Mapping[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)
    """What is entered around a pass, by name."""

    @property
    def last(self) -> str:
        """The name of the pass that runs last."""
        return list(self.tensors)[-1]

    def run(self, name: str) -> None:
        """Add the gradient of one pass to `.grad`."""
        loss = self.tensors[name]
        seed = torch.full_like(loss, self.seeds[name]) if name in self.seeds else None
        with self.around.get(name, nullcontext)():
            loss.backward(gradient=seed, retain_graph=self.keeps_graph[name])

    def of(self, sources: Collection[str]) -> "Passes":
        """The passes that some of the sources need, in the same order."""
        weights = {name: terms for name, terms in self.weights.items() if name in sources}
        needed = {name for terms in weights.values() for name in terms}
        return replace(
            self,
            tensors={name: loss for name, loss in self.tensors.items() if name in needed},
            weights=weights,
            losses={name: loss for name, loss in self.losses.items() if name in sources},
        )

    def not_reaching(self, parameters: Iterable[Tensor]) -> list[str]:
        """The losses in whose graph none of the parameters is."""
        known = set(map(id, parameters))
        return [
            name
            for name, loss in self.tensors.items()
            if not any(id(node.variable) in known for node in _nodes(loss) if _is_leaf(node))
        ]

    @property
    def accumulates_once(self) -> bool:
        """Whether a pass is sure to add to each `.grad` once.

        A function written in Python may run a backward pass of its own, as a reentrant checkpoint
        does; those of torch's data parallelism do not.
        """
        return not any(
            isinstance(node, BackwardCFunction)
            and not type(node).__module__.startswith("torch.distributed")
            for loss in self.tensors.values()
            for node in _nodes(loss)
        )


def plan(parameters: Sequence[Tensor], losses: Mapping[str, Loss], *, scale: float = 1.0) -> Passes:
    """The passes that the gradients of the losses need. Losses may share a forward.

    `scale` multiplies what a pass leaves, and not what the sources are: half precision keeps small
    gradients only where they are scaled up on their way.
    """
    tensors, weights = _resolved(losses)
    values = {name: loss.item() for name, loss in tensors.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"Loss `{name}` should be finite. Found {value}. "
                "Lower the learning rate or clip; no gradient was taken and nothing was recorded."
            )
    single = _seeds(weights)
    seeds = {n: scale * single.get(n, 1.0) for n in tensors} if scale != 1.0 else single
    return Passes(
        tensors=tensors,
        leaves=[*parameters, *_other_leaves(tensors.values(), parameters)],
        weights={
            source: {name: weight / seeds.get(name, 1.0) for name, weight in terms.items()}
            for source, terms in weights.items()
        },
        losses={
            source: sum(weight * values[name] for name, weight in terms.items())
            for source, terms in weights.items()
        },
        seeds=seeds,
        keeps_graph=dict(zip(tensors, _needed_later(list(tensors.values())), strict=True)),
        scale=scale,
    )


def check_reached(passes: Passes, parameters: Sequence[Tensor]) -> None:
    """Refuse the losses of another model: each has to reach one of the parameters.

    >>> ours, other = (torch.ones((), requires_grad=True) for _ in range(2))
    >>> check_reached(plan([ours], {"forget": other**2}), [ours])
    Traceback (most recent call last):
    ValueError: Loss `forget` should be computed with the model that is watched. Found none of ...
    """
    # FSDP2 has stand-ins for its parameters in the graph, a reentrant checkpoint has none.
    if any(map(distributed.is_sharded, parameters)) or not passes.accumulates_once:
        return
    others = passes.not_reaching(parameters)
    if others:
        raise ValueError(
            f"Loss `{others[0]}` should be computed with the model that is watched. Found none of "
            f"its {len(parameters)} parameters in the graph of the loss, as where the model was "
            "copied, wrapped or loaded again since. Make recorder and rectifier from the model "
            "that computes the losses."
        )


def check_no_step_inside(parameters: Iterable[Tensor]) -> None:
    """Refuse optimizers that step inside of a backward pass: each loss of a step has one."""
    hooked = [p for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked:
        raise RuntimeError(
            "No hook should run after a gradient is accumulated: several backward passes make a "
            f"step here. Found such hooks on {len(hooked)} parameters, as of an optimizer that "
            "steps inside of the backward pass and frees the gradient there. Step after the "
            "backward pass; or save checkpoints and record what `geffect.replay` finds in them."
        )


def loss_scale(scaler: GradScaler | None, device: torch.device) -> float:
    """What a GradScaler multiplies losses on the device by; 1 where there is none.

    >>> loss_scale(None, torch.device("cpu"))
    1.0
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # Not `get_scale()`: until it has scaled something a scaler refuses to unscale.
    return float(scaler.scale(torch.ones((), device=device)))


def declared(losses: Mapping[str, Loss]) -> dict[str, Mapping[str, float] | str]:
    """The weights of the losses that are combinations; "loss" for those that are tensors."""
    return {
        name: {part: float(weight) for part, weight in loss.items()}
        if isinstance(loss, Mapping)
        else "loss"
        for name, loss in losses.items()
    }


def of_objective(losses: Mapping[str, Loss]) -> dict[str, Loss]:
    """The losses that the objective needs: itself, and its parts where it is a combination."""
    objective = losses[OBJECTIVE]
    parts = objective if isinstance(objective, Mapping) else ()
    return {name: loss for name, loss in losses.items() if name == OBJECTIVE or name in parts}


def _resolved(
    losses: Mapping[str, Loss],
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The different tensors among the losses, and each loss in terms of them."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        if isinstance(loss, Mapping):
            continue
        _check(name, loss)
        first = next((other for other, seen in tensors.items() if seen is loss), name)
        tensors.setdefault(first, loss)
        weights[name] = {first: 1.0}
    single = dict(weights)
    for name, loss in losses.items():
        if not isinstance(loss, Mapping):
            continue
        if not (loss.keys() <= single.keys() and _are_weights(loss.values())):
            raise ValueError(
                f"Loss `{name}` should be a tensor, or weights of losses of this step that are "
                f"tensors, finite and not all zero. Found `{dict(loss)}`. Losses of this step that "
                f"are tensors: {', '.join(single) or 'none'}."
            )
        weights[name] = {}
        for part, weight in loss.items():
            (tensor,) = single[part]
            weights[name][tensor] = weights[name].get(tensor, 0.0) + float(weight)
        if not any(weights[name].values()):
            raise ValueError(
                f"Loss `{name}` should be left with some weight. Found weights that cancel out, "
                f"`{dict(loss)}`, of one tensor under several names. Pass different losses."
            )
    # The order of the sources is the order of the call, not of what kind they are.
    return tensors, {name: weights[name] for name in losses}


def _are_weights(values: Collection[object]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float)]
    return len(numbers) == len(values) and all(map(math.isfinite, numbers)) and any(numbers)


def _check(name: str, loss: object) -> None:
    should = f"Loss `{name}` should be a scalar tensor with a graph, or weights of other losses."
    if not isinstance(loss, Tensor):
        raise TypeError(f"{should} Found `{type(loss).__name__}`. Pass what the loss returned.")
    if loss.numel() != 1:
        raise ValueError(f"{should} Found shape {tuple(loss.shape)}. Take its mean or its sum.")
    if not loss.requires_grad:
        raise ValueError(
            f"{should} Found a tensor without a graph. Compute it outside of `torch.no_grad()`, "
            "from parameters that require a gradient, and do not detach it."
        )


def _seeds(weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The factor to start a pass with, where the objective is one multiple of one loss.

    The pass then computes the objective's own gradient, bit for bit, and the loss's is that over
    the factor.
    """
    terms = weights.get(OBJECTIVE, {})
    if len(terms) != 1:
        return {}
    ((name, weight),) = terms.items()
    return {} if weight == 1.0 else {name: weight}


def _needed_later(losses: Sequence[Tensor]) -> list[bool]:
    """For each loss, whether a later one shares a part of its graph that is not a leaf."""
    graphs = [{node for node in _nodes(loss) if not _is_leaf(node)} for loss in losses]
    return [
        any(not graph.isdisjoint(later) for later in graphs[i + 1 :])
        for i, graph in enumerate(graphs)
    ]


def _other_leaves(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graphs that are none of the parameters."""
    known = set(map(id, parameters))
    leaves = [node.variable for loss in losses for node in _nodes(loss) if _is_leaf(node)]
    found = {id(leaf): leaf for leaf in leaves}
    return [leaf for place, leaf in found.items() if place not in known]


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
