"""The gradients of the named losses of one step, in terms of what its passes left."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from geffect import dots
from geffect.sources import OBJECTIVE

from .vectors import Vector, Weights, add_to_grads, added, combined, weighted_sum


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

        add_to_grads(leaves, summed, copy=copy)

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
        new = [leaf for leaf in later.others if id(leaf) not in known]
        self.others.extend(new)
        place_of = {id(leaf): place for place, leaf in enumerate(self.others, count)}
        places = [*range(count), *(place_of[id(leaf)] for leaf in later.others)]
        for name, vector in self.vectors.items():
            vector.extend([None] * len(new))
            for place, tensor in zip(places, later.vectors[name], strict=True):
                own = vector[place]
                if own is None:
                    vector[place] = tensor
                elif tensor is not None:
                    vector[place] = added(own, tensor, in_place=True)
        for name, value in later.losses.items():
            self.losses[name] += value
        self.peaks.clear()

    def _summed(self, source: str) -> list[Tensor | None]:
        terms = [(self.vectors[name], weight) for name, weight in self.weights[source].items()]
        return [
            weighted_sum([(v[i], weight) for v, weight in terms]) for i in range(len(terms[0][0]))
        ]
