"""RR: the regulariser that holds the representations of retain answers to those of before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geffect.batch import Batch, Pair, side_of
from geffect.risk import token_mean
from geffect.sources import RETAIN

from .base import Component, Objective, Reduction
from .hidden_states import THIRD, check_layer, chosen, hidden_states, of_answers
from .reference import Reference

PART = "rr"
"""The name of its component."""


@dataclass(frozen=True)
class RR(Objective):
    """RR, representation retention: the mean of |h_k - h_{o,k}|^2 on the retain batch.

    Over the answer tokens: h_k are the hidden states of layer k at the tokens themselves, h_{o,k}
    those of the reference, the model before unlearning; the squares are summed over the hidden
    size. `retain_layer` is k, an index of hidden states with 0 for the embedding, or a share of
    the layers, rounded down and one at least. Parameters above k have no gradient.

    Unverified: the paper names this regulariser and no code of it is released; the formula is the
    natural one.

    >>> RR(retain_layer=7).reference
    'hidden states'
    """

    source = "arXiv 2502.19301 by name; the formula is unverified"
    reference = "hidden states"
    sides = (RETAIN,)

    retain_layer: float = THIRD

    def __post_init__(self) -> None:
        check_layer("RR", "retain_layer", self.retain_layer)

    def components(
        self, model: Any, batch: Pair, reference: Reference | None = None
    ) -> dict[str, Component]:
        known = self.compared(reference, model)

        def loss() -> Tensor:
            retain = side_of(batch, RETAIN)
            found, scored = self._of(hidden_states(model, retain), model, retain)
            before, _ = self._of(known.hidden_states(retain), model, retain)
            if before.shape != found.shape:
                raise ValueError(
                    "`reference` should give hidden states of the size that the model has. Found "
                    f"{before.shape[-1]} beside {found.shape[-1]}. Pass the model as it was before "
                    "unlearning."
                )
            return token_mean((found - before).square().sum(dim=-1), scored)

        return {PART: Component(loss)}

    @property
    def reductions(self) -> Mapping[str, Reduction]:
        return {PART: Reduction(RETAIN, "token_mean")}

    def _of(self, states: tuple[Tensor, ...], model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states of the layer at the answer tokens, and what is scored."""
        return of_answers(model, chosen(states, self.retain_layer, "retain_layer"), batch)
