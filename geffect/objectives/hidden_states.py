"""The hidden states of answer tokens, and which of them an objective means by its layer."""

from functools import partial
from math import floor
from typing import Any

from torch import Tensor

from geffect.batch import Batch, labels_of
from geffect.numbers import is_number
from geffect.risk import inputs_of, predicts_next, scored_tokens
from geffect.risk.alignment import unwrapped
from geffect.risk.dependence import look_at
from geffect.risk.likelihood import at_least_float32
from geffect.risk.packing import look_apart

THIRD = 1 / 3
"""The share of the layers below the hidden states that are taken by default."""


def check_layer(owner: str, option: str, layer: float) -> None:
    """Refuse what names no hidden states of any model.

    >>> check_layer("RMU", "layer", 2.5)
    Traceback (most recent call last):
    ValueError: `layer` of RMU should be an index of hidden states, 0 for the embedding, or a ...
    """
    if is_number(layer) and (0 < layer < 1 or (layer >= 0 and layer == floor(layer))):
        return
    raise ValueError(
        f"`{option}` of {owner} should be an index of hidden states, 0 for the embedding, or a "
        f"share of the layers between 0 and 1. Found `{option} = {layer!r}`. Pass, say, "
        f"{owner}({option}=7), or {owner}({option}=0.5) for the middle."
    )


def index_of(layer: float, layers: int) -> int:
    """The index of hidden states in a model of so many layers: 0 is the embedding.

    A share of the layers is rounded down, and is one layer at least.

    >>> [index_of(share, 32) for share in (THIRD, 2 / 3, 7)], index_of(THIRD, 2)
    ([10, 21, 7], 1)
    """
    return max(1, floor(layer * layers)) if 0 < layer < 1 else int(layer)


def chosen(states: tuple[Tensor, ...], layer: float, option: str) -> Tensor:
    """The hidden states of a layer; a ValueError where the model has none of that index."""
    index = index_of(layer, len(states) - 1)
    if index >= len(states):
        raise ValueError(
            f"`{option}` should be the index of hidden states that the model has: 0 to "
            f"{len(states) - 1}, 0 for the embedding. Found {index}. Pass one of those, or a share "
            "of the layers between 0 and 1."
        )
    return states[index]


def of_answers(model: Any, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states at the answer tokens themselves, and the mask of what is scored.

    `Float[sample, position, hidden]` and `Bool[sample, position]`, positions as those of
    `scored_tokens`; in float32 or finer.
    """
    expected = tuple(labels_of(batch).shape)
    if tuple(states.shape[:2]) != expected:
        raise ValueError(
            "`model` should return hidden states for each position of `labels`. Found them for "
            f"{tuple(states.shape[:2])} of {expected}. Pass labels as long as the inputs, and a "
            "model that puts no tokens of its own before them."
        )
    return states[:, 1:].to(at_least_float32(states)), scored_tokens(model, batch)


def hidden_states(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    """What the model returns as `.hidden_states` of a batch: the embedding's, then each layer's.

    Raises ValueError for a model that returns none, and for an encoder-decoder, which has two
    stacks of them.
    """
    if not predicts_next(model):
        raise ValueError(
            "`model` should be a causal language model where hidden states are compared. Found "
            f"`{type(unwrapped(model)).__name__}`, an encoder-decoder. Choose an objective of "
            "logits, such as NPO or KL."
        )
    inputs = inputs_of(model, batch)
    look_at(unwrapped(model), inputs, partial(look_apart, batch=batch))
    states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if states is None:
        raise ValueError(
            "`model` should return `.hidden_states` where it is called with "
            f"output_hidden_states=True. Found none from `{type(unwrapped(model)).__name__}`. Pass "
            "a language model of transformers, or let yours return them beside its logits."
        )
    return tuple(states)
