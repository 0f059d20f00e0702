"""The gradients of one step: one backward pass a loss, and nothing else changed.

The primitive is to put `.grad` aside, run a real `.backward()`, and take what it leaves:
`torch.autograd.grad` would bypass the hooks that data-parallel and sharded training live on.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed, dots
from geffect.beside import beside
from geffect.hooks import Hooks
from geffect.interrupts import put_back_after, to_the_end
from geffect.losses import Elsewhere, Loss, Passes, accumulates_once, plan
from geffect.sources import OBJECTIVE

__all__ = [
    "AtCopy",
    "GradientTransform",
    "Gradients",
    "Loss",
    "Rectification",
    "Vector",
    "differentiate",
]

Vector = Sequence[Tensor | None]
"""A gradient of the model: one tensor a parameter, None where the loss does not reach it."""

Weights = Mapping[str, Mapping[str, float]]
"""Sources as linear combinations of vectors, both by their names."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of the named losses of one step.

    `vectors` holds what the backward passes left, one a pass; `weights` gives every source as a
    linear combination of them, so that a declared combination costs no pass and no memory. `others`
    are leaves beside the parameters, such as a soft prompt, whose tensors follow in the vectors.
    `scale` is that of a GradScaler, by which the vectors are too large, and the sources are not.
    `peaks` are the largest coordinates of sources, of all processes, where they were read together
    with the losses.
    """

    parameters: Sequence[Tensor]
    others: list[Tensor]
    vectors: dict[str, list[Tensor | None]]
    weights: Weights
    losses: dict[str, float]
    scale: float = 1.0
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the losses, in the order in which they were given."""
        return tuple(self.weights)

    @property
    def declared(self) -> dict[str, Mapping[str, float] | str]:
        """The weights of the sources that are combinations; "loss" for those that are not."""
        # A vector is a multiple of the source that is named like it, where there is one.
        own = {name: terms[name] for name, terms in self.weights.items() if name in terms}
        return {
            source: "loss"
            if source in terms or not terms.keys() <= self.weights.keys()
            else {name: w / own.get(name, 1 / self.scale) for name, w in terms.items()}
            for source, terms in self.weights.items()
        }

    def of(self, source: str, *, copy: bool = False) -> Vector:
        """The gradient of one source. The tensors are those of `vectors` where no sum is needed.

        With `copy` they are others.
        """
        summed = self._summed(source)[: len(self.parameters)]
        if not copy:
            return summed
        own = {id(tensor) for vector in self.vectors.values() for tensor in vector}
        return [t.clone() if t is not None and id(t) in own else t for t in summed]

    def check_of(self, parameters: Sequence[Tensor]) -> None:
        """Refuse the gradients of another model."""
        if list(map(id, self.parameters)) != list(map(id, parameters)):
            raise ValueError(
                "A rectifier or recorder should be made for the model that is trained. Found "
                "gradients of another one, or of parameters that were frozen or added since. Make "
                "it from the same model."
            )

    def check_followed(self, weights: Weights) -> None:
        """Refuse a later micro-batch of the same step that has other sources."""
        if self.weights != weights:
            raise ValueError(
                "The micro-batches of a step should have the same losses, weights and scale. Found "
                f"{', '.join(self.sources)} and then {', '.join(weights)}, or other weights. "
                "Pass the same losses to each; to leave one out, pass 0 * loss."
            )

    def deposit(self, *, among: Collection[str] | None = None, copy: bool = False) -> None:
        """Leave in `.grad` what a backward pass of the objective would have left there.

        That is times `scale`. With `among`, what these vectors contribute to it.
        """
        terms = [
            (self.vectors[name], weight * self.scale)
            for name, weight in self.weights[OBJECTIVE].items()
            if among is None or name in among
        ]
        leaves = [*self.parameters, *self.others]

        def summed(place: int) -> Tensor | None:
            return weighted_sum([(vector[place], weight) for vector, weight in terms])

        _add_to_grads(leaves, summed, copy=copy)

    def gram(self, **further: Vector) -> Tensor:
        """The Gram matrices `Float64[parameter, source, source]`, on the CPU.

        `further` are gradients that did not come from a loss; they follow the sources.
        """
        count = len(self.parameters)
        basis = {**{name: v[:count] for name, v in self.vectors.items()}, **further}
        products = dots.grams(zip(*basis.values(), strict=True))
        return combined(
            products, list(basis), {**self.weights, **{name: {name: 1.0} for name in further}}
        )

    def add_(self, later: "Gradients") -> None:
        """Take in a later micro-batch of the same step, in place: vectors and losses add up."""
        self.check_followed(later.weights)
        count = len(self.parameters)
        # A soft prompt is the same leaf every time, but the output of a frozen embedding another.
        known = set(map(id, self.others))
        added = [leaf for leaf in later.others if id(leaf) not in known]
        self.others.extend(added)
        place_of = {id(leaf): place for place, leaf in enumerate(self.others, count)}
        places = [*range(count), *(place_of[id(leaf)] for leaf in later.others)]
        for name, vector in self.vectors.items():
            vector.extend([None] * len(added))
            for place, tensor in zip(places, later.vectors[name], strict=True):
                own = vector[place]
                if own is None:
                    vector[place] = tensor
                elif tensor is not None:
                    vector[place] = _added(own, tensor, in_place=True)
        for name, value in later.losses.items():
            self.losses[name] += value
        self.peaks.clear()

    def _summed(self, source: str) -> list[Tensor | None]:
        terms = [(self.vectors[name], weight) for name, weight in self.weights[source].items()]
        return [
            weighted_sum([(v[i], weight) for v, weight in terms]) for i in range(len(terms[0][0]))
        ]


class GradientTransform(Protocol):
    """What may change a gradient on its way to the optimizer, as far as a recorder has to know."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """What the report has a number for."""

    @property
    def watched(self) -> Mapping[str, Vector]:
        """Gradients of its own that belong into the record, such as a running average."""

    @property
    def changes_gradient(self) -> bool:
        """Whether it changes `.grad`, and not the optimizer's own step, or nothing."""

    @property
    def report(self) -> "Rectification | None":
        """What it did in the step that has just been taken."""

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up, for the record."""

    def observe(self, gradients: Gradients) -> None:
        """Take note of the gradients of a step, before anything is changed."""

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the objective's gradient in `.grad`, changed, or prepare to change the step.

        With `copy` the tensors of `gradients` stay as they are.
        """


class AtCopy(Protocol):
    """Where the objective's gradient is taken, if not at the parameters as they are.

    As far as a recorder and a rectifier have to know of `geffect.Relearned`.
    """

    @property
    def options(self) -> Mapping[str, object]:
        """What it is, for the record."""

    def elsewhere(
        self, model: nn.Module, losses: Mapping[str, Loss], scaler: GradScaler | None
    ) -> Elsewhere:
        """The place for one step of these losses."""


@dataclass(frozen=True)
class Rectification:
    """What a rectifier did in one step, one number a block.

    `inner` and `norm` are <u, r> and |u| of what was rectified before and after, `retain_norm` is
    |r|, and `coefficient` the weight that r got: NaN where no multiple of r was added. `applied` is
    <step, r> of the step that the optimizer took, theta before minus theta after, against the
    average and against the retain gradient of this step: NaN where it was not followed. A negative
    inner product harms what should stay. `unmet` is 1 where the rule could not keep what it
    promises. Against several retain sets there is a number for each block and set.
    """

    blocks: tuple[str, ...]
    fired: tuple[float, ...]
    coefficient: tuple[float, ...]
    inner_before: tuple[float, ...]
    inner_after: tuple[float, ...]
    norm_before: tuple[float, ...]
    norm_after: tuple[float, ...]
    retain_norm: tuple[float, ...]
    applied_average: tuple[float, ...]
    applied_fresh: tuple[float, ...]
    unmet: tuple[float, ...]


def differentiate(
    parameters: Sequence[Tensor],
    losses: Mapping[str, Loss],
    *,
    elsewhere: Elsewhere | None = None,
) -> Gradients:
    """The gradients of the losses, one backward pass for each scalar and none for a combination.

    What stood in `.grad` stands there again afterwards. Losses may share a forward: the graph is
    kept for as long as a later loss needs it. One that is a function is asked right before its
    pass. With `elsewhere` that of the objective is made there.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> step = differentiate([x], {"forget": x**2, "objective": {"forget": -1.0}})
    >>> step.of("objective"), x.grad
    ([tensor(-6.)], None)
    """
    return separate(parameters, plan(parameters, losses, elsewhere=elsewhere))


def separate(parameters: Sequence[Tensor], passes: Passes) -> Gradients:
    """The gradients that the passes leave, each by itself, and `.grad` as it was."""
    return _read(passes, _left_by(passes), ())


def reduced(
    model: nn.Module,
    parameters: Sequence[Tensor],
    passes: Passes,
    *,
    peaks_of: Collection[str] = (),
    exchange: distributed.Exchange | None = None,
) -> Gradients:
    """The same on several processes: each gradient by itself, of all of their data.

    Under DDP the forwards were made inside of `no_sync()`, and the gradients are averaged here.
    With an `exchange`, which comes before that, losses and `peaks_of` are those of all processes.
    """
    with distributed.gradient_sync(model):
        left = _left_by(passes)
    distributed.take_over_step(parameters)
    averages = distributed.averages(model)
    if exchange is None:
        gradients, present = _read(passes, left, ()), None
    else:
        # What is averaged has the same largest coordinates everywhere, once it is.
        looked = () if averages else peaks_of
        gradients, present = of_all_ranks(lambda: _read(passes, left, looked), exchange)
    if averages:
        averaged = distributed.average(parameters, gradients.vectors, present)
        gradients.vectors.update(averaged)
    return gradients


def of_all_ranks(
    read: Callable[[], Gradients], exchange: distributed.Exchange
) -> tuple[Gradients, Tensor]:
    """The gradients with what all processes know of them, and on how many each tensor is there."""
    told: list[tuple[Gradients, list[Tensor]]] = []

    def part() -> Tensor:
        gradients = read()
        tables = [
            distributed.presence(gradients.parameters, gradients.vectors),
            torch.tensor([*gradients.losses.values()], dtype=torch.float64),
            distributed.in_own_row([*gradients.peaks.values()]),
        ]
        told.append((gradients, tables))
        return distributed.packed(tables)

    total = exchange(part)
    ((gradients, tables),) = told
    present, losses, peaks = distributed.unpacked(total, tables)
    means, largest = losses / distributed.world_size(), peaks.amax(dim=0)
    everywhere = replace(
        gradients,
        losses=dict(zip(gradients.losses, means.tolist(), strict=True)),
        peaks=dict(zip(gradients.peaks, largest.tolist(), strict=True)),
    )
    return everywhere, present


def _left_by(passes: Passes) -> dict[str, list[Tensor | None]]:
    """What each pass leaves in the `.grad` of the leaves."""
    taken: dict[str, list[Tensor | None]] = {}
    kept = _Kept(passes.leaves)

    def take(name: str) -> None:
        taken[name] = _run(passes, name, kept)

    put_back_after(lambda: _in_order(passes, take), kept.put_back)
    # Leaves that a later loss has brought have nothing of the earlier ones.
    width = len(passes.leaves)
    return {name: [*taken[name], *[None] * (width - len(taken[name]))] for name in passes.names}


def _read(
    passes: Passes, vectors: dict[str, list[Tensor | None]], peaks_of: Collection[str]
) -> Gradients:
    """The gradients with what is read of them, of all at once."""
    count = len(passes.parameters)
    # Of what is a vector as it is: no sum is made for it.
    ends = {
        name: largest(vectors[name][:count])
        for name in peaks_of
        if passes.weights[name] == {name: 1.0}
    }
    peaks = dict(zip(ends, passes.values.read(*ends.values()), strict=True))
    return Gradients(
        passes.parameters,
        passes.leaves[count:],
        vectors,
        passes.weights,
        passes.losses,
        passes.scale,
        peaks,
    )


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
    leaves, last = passes.leaves, passes.last
    terms = {name: weight * passes.scale for name, weight in passes.weights[OBJECTIVE].items()}
    sums = {} if earlier is None else earlier
    resident: dict[str, list[Tensor | None]] = {}
    left: dict[int, Tensor | None] = {}
    kept = _Kept(leaves)
    hooks = Hooks()

    def into(name: str) -> list[Tensor | None]:
        return [] if name in terms else sums.pop(name, [])

    def summed(place: int, name: str, tensor: Tensor | None) -> Tensor | None:
        if earlier is None or name not in terms:
            return tensor
        vector = sums.get(name, [])
        total = _taken(vector, place)
        if total is None:
            return None if tensor is None else tensor.clone()
        return total if tensor is None else _added(total, tensor, in_place=True)

    def take(place: int, fresh: Tensor | None) -> None:
        tensors = {name: _taken(vector, place) for name, vector in resident.items()} | {last: fresh}
        if place < len(parameters):
            visit(place, {name: summed(place, name, tensors[name]) for name in passes.names})
        left[place] = weighted_sum([(tensors[name], weight) for name, weight in terms.items()])

    def take_grad(leaf: Tensor, place: int) -> None:
        if place in left:
            raise RuntimeError(
                "A backward pass should add to each `.grad` once. Found a second time for a "
                f"parameter of shape {tuple(leaf.shape)}. Record with update=True, which takes "
                "the gradients after the pass."
            )
        fresh, leaf.grad = leaf.grad, None
        take(place, fresh)

    def watch(loss: Tensor) -> None:
        if accumulates_once(loss):
            for place, leaf in enumerate(parameters):
                hooks.add(leaf.register_post_accumulate_grad_hook, partial(take_grad, place=place))

    def run(name: str) -> None:
        if name != last:
            resident[name] = _run(passes, name, kept, into=into(name))
            return
        put_back_after(
            lambda: _run(passes, name, kept, into=into(name), before=watch), hooks.remove
        )
        for place, leaf in enumerate(leaves):  # what the last loss does not reach, and the others
            if place not in left:
                fresh, leaf.grad = leaf.grad, None
                take(place, fresh)

    put_back_after(lambda: _in_order(passes, run), kept.put_back)
    (settle or passes.values.read)()  # what is not finite is known before `.grad` is written
    _add_to_grads(leaves, left.get)


def without_graph(body: Callable[[], None]) -> None:
    """Do what is no part of a graph; graphs are made afterwards as before, whatever is raised."""
    enabled = torch.is_grad_enabled()

    def run() -> None:
        torch.set_grad_enabled(False)
        body()

    def put_back() -> None:
        torch.set_grad_enabled(enabled)

    put_back_after(run, put_back)


def combined(products: Tensor, basis: Sequence[str], weights: Weights) -> Tensor:
    """The Gram matrices of linear combinations, `Float64[..., source, source]`, from the basis's.

    Term by term, not as W K W^T: a zero weight must not meet a gradient that is not finite.
    """
    place = {name: i for i, name in enumerate(basis)}
    K = products.new_empty(*products.shape[:-2], len(weights), len(weights))
    for i, a in enumerate(weights.values()):
        for j, b in enumerate(list(weights.values())[: i + 1]):
            terms = [
                v * w * products[..., place[x], place[y]]
                for x, v in a.items()
                for y, w in b.items()
            ]
            K[..., i, j] = K[..., j, i] = torch.stack(terms).sum(dim=0)
    return K


def peak(vector: Iterable[Tensor | None]) -> float:
    """The largest coordinate, without its sign, of what this process holds; NaN if one is.

    It tells zero and infinity, and unlike a sum of squares it neither under- nor overflows.
    """
    return float(largest(vector))


def largest(vector: Iterable[Tensor | None]) -> Tensor:
    """The same as a tensor, which no device has been waited for."""
    parts = [dots.dense(distributed.local(t)).detach() for t in vector if t is not None]
    ends = _ends([part for part in parts if part.numel()])
    if not ends:
        return torch.zeros(())
    return torch.cat([end.to(ends[0].device) for end in ends]).abs().max()


def _ends(parts: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of few numbers, the largest of which, without signs, is that of the parts."""
    ends, together = [], dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for part in parts:
        if part.device.type == "cpu":  # where a norm takes ten times as long
            ends.append(torch.stack(part.aminmax()).float())
        else:
            together.setdefault((part.device, part.dtype), []).append(part)
    return ends + [
        torch.stack(torch._foreach_norm(alike, torch.inf)).float() for alike in together.values()
    ]


def weighted_sum(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """The sum of the tensors that are there, each times its weight; None if none is."""
    total: Tensor | None = None
    is_new = False
    for tensor, weight in terms:
        if tensor is None:
            continue
        part = tensor if weight == 1.0 else tensor * weight
        if total is None:
            total, is_new = part, weight != 1.0
        else:
            # In place where it can be: a large parameter has one tensor less in memory.
            total = _added(total, part, in_place=is_new)
            is_new = True
    return total


def _added(total: Tensor, part: Tensor, *, in_place: bool) -> Tensor:
    """The sum, in place where the layout of `total` can hold it: sparse and dense is dense."""
    if dots.is_sparse(total) and not dots.is_sparse(part):
        return part + total
    return total.add_(part) if in_place else total + part


class _Kept:
    """The `.grad` that leaves had before the passes, from when each of them is known."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._grads: list[tuple[Tensor, Tensor | None]] = []

    def clear(self) -> None:
        """Nothing lies in the `.grad` of any leaf that is known."""
        for leaf in self._leaves[len(self._grads) :]:
            self._grads.append((leaf, leaf.grad))
        for leaf in self._leaves:
            leaf.grad = None

    def put_back(self) -> None:
        """What was there before lies there again."""
        for leaf, grad in self._grads:
            leaf.grad = grad


def _in_order(passes: Passes, run: Callable[[str], None]) -> None:
    """Run the passes, those that are aside without a trace in the model."""
    aside = list(passes.aside)
    if passes.moved:
        assert passes.elsewhere is not None
        with passes.elsewhere.block():
            for name in passes.moved:
                run(name)
    for name in passes.given:
        if name not in aside and name not in passes.moved:
            run(name)
    if aside:
        with nullcontext() if passes.model is None else beside(passes.model):
            for name in aside:
                run(name)


def _run(
    passes: Passes,
    name: str,
    kept: _Kept,
    *,
    into: Sequence[Tensor | None] = (),
    before: Callable[[Tensor], None] = lambda loss: None,
) -> list[Tensor | None]:
    """What a pass leaves, added to the tensors of `into`; `before` is called with its loss."""
    kept.clear()
    loss = passes.ask(name)
    kept.clear()
    for parameter, tensor in zip(passes.parameters, into, strict=False):
        parameter.grad = tensor
    before(loss)
    passes.run(name, loss)
    return [leaf.grad for leaf in passes.leaves]


def _taken(vector: list[Tensor | None], place: int) -> Tensor | None:
    """The tensor of a place, taken out of the vector; None where it has no such place."""
    if place >= len(vector):
        return None
    tensor, vector[place] = vector[place], None
    return tensor


def _add_to_grads(
    leaves: Sequence[Tensor], tensor_of: Callable[[int], Tensor | None], *, copy: bool = False
) -> None:
    """Add to every `.grad` its tensor, if there is one; an interrupt waits until all are added."""
    before = [(leaf, leaf.grad, _version(leaf.grad)) for leaf in leaves]

    def add() -> None:
        for place, (leaf, grad, version) in enumerate(before):
            if leaf.grad is not grad or _version(grad) != version:
                continue  # it was added before an interrupt
            tensor = tensor_of(place)
            if tensor is not None and grad is not None:
                leaf.grad = _added(grad, tensor, in_place=True)
            elif tensor is not None:
                leaf.grad = tensor.clone() if copy else tensor

    to_the_end(add)


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version
