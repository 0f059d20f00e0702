"""The collector: takes the gradients of a step one parameter at a time, and keeps what is asked."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect import devices, distributed, dots
from geffect.encodings import ENCODINGS
from geffect.gradients import Weights, combined, weighted_sum
from geffect.layers import Parameter, layers_of
from geffect.sketch import Sketch
from geffect.sources import OBJECTIVE, UPDATE

log = logging.getLogger(__name__)

Encoded = dict[str, dict[str, Mapping[str, np.ndarray]]]
"""Stored gradients: the arrays of the encoding, by source and layer."""


@dataclass(frozen=True)
class Measurement:
    """What is known of the gradients of one step: all that a row of a run file says of them.

    `gram` is `Float64[parameter, source, source]` in the order of `names`, `expert_gram` the same
    of single experts, `sketches` are `Float32[source, layer, width]`, and `losses` those of the
    sources that are losses. `gradients` are on their way from a device until `arrived` has been.
    """

    names: Sequence[str]
    gram: Tensor
    losses: Mapping[str, float]
    sketches: Tensor | None = None
    gradients: Encoded | None = None
    arrived: Callable[[], None] | None = None
    expert_gram: Tensor | None = None


class Collector:
    """Takes each parameter's gradients once; none of them has to be there when the next is taken.

    `weights` gives the sources in terms of what is taken. With a `sketch`, the sources are folded
    into it. With an `encoding`, a layer is encoded as soon as all of its parameters among `indices`
    have been taken; `seed` is that of stochastic rounding.
    """

    def __init__(
        self,
        table: Sequence[Parameter],
        parameters: Sequence[Tensor],
        weights: Weights,
        *,
        sketch: Sketch | None = None,
        encoding: str | None = None,
        indices: Sequence[int] = (),
        ranges: Sequence[tuple[int, int]] = (),
        seed: str = "",
    ) -> None:
        self._table, self._parameters, self._weights = table, parameters, weights
        self._basis: list[str] = []
        self._matrices: dict[int, Tensor] = {}
        self._experts: dict[int, list[Tensor]] = {}
        self._sketches = None if sketch is None else _Sketches(sketch, table, parameters)
        self._layers = (
            None
            if encoding is None
            else _Layers(encoding, table, parameters, indices, ranges, seed)
        )

    def take(self, index: int, tensors: Mapping[str, Tensor | None]) -> None:
        """Take what the passes left for one parameter."""
        local = {
            name: None if tensor is None else dots.dense(distributed.local(tensor.detach()))
            for name, tensor in tensors.items()
        }
        self._basis = list(local)
        if self._table[index].experts:
            self._experts[index] = self._by_expert(index, [*local.values()])
            self._matrices[index] = torch.stack(self._experts[index]).sum(dim=0)
        else:
            self._matrices[index] = dots.gram([*local.values()])
        if self._sketches is not None:
            self._sketches.take(index, local)
        if self._layers is not None:
            for source, terms in self._weights.items():
                tensor = weighted_sum([(local[name], weight) for name, weight in terms.items()])
                self._layers.take(index, source, tensor)

    def measured(self, losses: Mapping[str, float], exchange: distributed.Exchange) -> Measurement:
        """What is kept, after every parameter has been taken; summed up in one `exchange`."""
        every = range(len(self._table))
        of_parameters = {index: [self._matrices[index]] for index in every}
        single = {index: self._experts[index] for index in every if index in self._experts}
        over = [*map(distributed.holders, self._parameters)]
        tables, owners = [], []
        for matrices in filter(None, (of_parameters, single)):
            tables.append(dots.on_cpu([matrix for own in matrices.values() for matrix in own]))
            owners.append([over[index] for index, own in matrices.items() for _ in own])
        if self._sketches is not None:
            tables.append(self._sketches.by_holders(self._weights))
            owners.append(self._sketches.holders)
        sums = distributed.PartialSums(tables, owners)
        found = sums.filled(exchange(lambda: sums.message))
        grams = [combined(K, self._basis, self._weights) for K in found[: 1 + bool(single)]]
        return Measurement(
            names=tuple(self._weights),
            gram=grams[0],
            expert_gram=grams[1] if single else None,
            losses=losses,
            sketches=None if self._sketches is None else found[-1].sum(dim=0).float(),
            gradients=None if self._layers is None else self._layers.encoded,
            arrived=None if self._layers is None else devices.arrival(self._layers.places),
        )

    def _by_expert(self, index: int, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """The Gram matrix of every expert of a tensor, of the rows of it that are here."""
        ranges = distributed.expert_ranges(self._parameters[index], self._table[index].experts)
        return [
            dots.gram([None if v is None else v[begin:end] for v in vectors])
            for begin, end in ranges
        ]


class _Sketches:
    """The sketch of each vector that is taken, a layer a row. Sources are combinations of them."""

    def __init__(
        self, sketch: Sketch, table: Sequence[Parameter], parameters: Sequence[Tensor]
    ) -> None:
        self._sketch, self._table, self._parameters = sketch, table, parameters
        self._layers = layers_of(table)
        self._over = list(map(distributed.holders, parameters))
        # What processes hold parts of adds up over them, what each holds whole does not.
        self._folds: dict[Any, dict[tuple[str, torch.device], Tensor]] = {
            over: {} for over in self._over
        }
        self._nothing = torch.zeros(len(self._layers), sketch.width, dtype=torch.float64)

    def take(self, index: int, tensors: Mapping[str, Tensor | None]) -> None:
        layer = self._layers.index(self._table[index].layer)
        start, _ = distributed.local_range(self._parameters[index])
        folds = self._folds[self._over[index]]
        for name, tensor in tensors.items():
            if tensor is not None:
                fold = self._sketch.fold(tensor.flatten(), self._table[index].name, start)
                # Summed where it is: each device is waited for once.
                if (name, fold.device) not in folds:
                    folds[name, fold.device] = torch.zeros_like(self._nothing, device=fold.device)
                folds[name, fold.device][layer] += fold

    @property
    def holders(self) -> list[Any]:
        """Over which groups of processes there are sketches of parts."""
        return list(self._folds)

    def by_holders(self, weights: Weights) -> Tensor:
        """`Float64[holders, source, layer, width]`, the terms of which the sketches are the sum."""
        shape = len(self._folds), len(weights), *self._nothing.shape
        total = torch.zeros(shape, dtype=torch.float64)
        for part, folds in zip(total, self._folds.values(), strict=True):
            for row, terms in zip(part, weights.values(), strict=True):
                for (name, _), fold in folds.items():
                    if name in terms:
                        row += terms[name] * fold.cpu()
        return total


class _Layers:
    """The gradients of a layer, held until all of its parameters are there, then encoded."""

    def __init__(
        self,
        encoding: str,
        table: Sequence[Parameter],
        parameters: Sequence[Tensor],
        indices: Sequence[int],
        ranges: Sequence[tuple[int, int]],
        seed: str,
    ) -> None:
        self._encoding, self._table, self._parameters = ENCODINGS[encoding], table, parameters
        self._seed = seed
        self._sizes = {p: stop - start for p, (start, stop) in zip(indices, ranges, strict=True)}
        self._members: dict[str, list[int]] = {}
        for index in indices:
            self._members.setdefault(table[index].layer, []).append(index)
        self._waiting: dict[tuple[str, str], dict[int, Tensor]] = {}
        self.encoded: Encoded = {}
        self.places: set[torch.device] = set()  # from which they come

    def take(self, index: int, source: str, tensor: Tensor | None) -> None:
        layer = self._table[index].layer
        if index not in self._members.get(layer, ()):
            return
        if tensor is None:
            tensor = torch.zeros_like(distributed.local(self._parameters[index].detach()))
        waiting = self._waiting.setdefault((source, layer), {})
        # Of what several processes hold whole, one keeps all and the others nothing.
        waiting[index] = tensor.flatten()[: self._sizes[index]]
        if len(waiting) == len(self._members[layer]):
            self._encode(source, layer)

    def _encode(self, source: str, layer: str) -> None:
        waiting = self._waiting.pop((source, layer))
        whole = torch.cat([waiting[index] for index in self._members[layer]])
        # Another seed for each vector, so that the errors of rounding are independent.
        digest = hashlib.blake2b(f"{self._seed}/{source}/{layer}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")
        arrays = self._encoding.encode(whole, seed, fetch=devices.fetched)
        self.places.add(whole.device)
        self.encoded.setdefault(source, {})[layer] = arrays


def tell_of_climb(measured: Measurement) -> None:
    """Warn where an update goes up the gradient of the objective, but for a small angle."""
    if OBJECTIVE not in measured.names or UPDATE not in measured.names:
        return
    of_both = [measured.names.index(OBJECTIVE), measured.names.index(UPDATE)]
    (u, across), (_, v) = measured.gram.sum(dim=0)[of_both][:, of_both].tolist()
    if across > 0.9 * math.sqrt(u * v):
        log.warning(
            "The first step has gone up the gradient of the objective. G-effects take it to go "
            "down: every sign of them is wrong for a step that climbs. Pass the negated loss as "
            "`objective`, and let the step descend."
        )
