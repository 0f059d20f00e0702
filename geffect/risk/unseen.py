"""Whether a model is told a token before it is asked for it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geffect.batch import IGNORED, masks_in

from .dependence import LateLook, Look, kind_of

_UNSEEN: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
"""Models that were seen to predict tokens unseen, with the kinds of inputs that they had."""


def look_unseen(model: nn.Module, inputs: Mapping[str, Any], *, labels: Tensor) -> Look:
    """A look at whether logits for a token change with that token, or with those behind.

    There is need of it once for each model and kind of inputs, with another end of one answer. No
    name and no configuration tells it of all models: a mask may be forgotten, or be made of inputs
    that are not there. Only one changes, since rows meet in experts of limited capacity.

    - `labels`: those that the model predicts.
    """

    def refusal(found: str) -> str:
        return (
            f"`{type(model).__name__}` should predict each token unseen, as a causal model does. "
            f"Found that its logits change by {found} with the tokens that they are to predict "
            "and those behind. Load a causal model, or make this one causal: by a mask, by "
            "`is_decoder=True` in its config, or by the inputs that tell it what is a question, "
            "such as `token_type_ids`."
        )

    no_need = Look(torch.zeros_like(labels, dtype=torch.bool), refusal)
    name = next((n for n in ("labels", "decoder_input_ids", "input_ids") if n in inputs), None)
    known, kind = _UNSEEN.setdefault(model, set()), kind_of(model, inputs)
    if name is None or kind in known:
        return no_need
    tokens = inputs[name]
    masks = masks_in(inputs, "attention_mask" if name == "input_ids" else "decoder_attention_mask")
    before, asked = _halves(labels.to(tokens.device), next(masks, None))
    # What is no label as such is told one place later than it is asked for, and no last label is.
    told = F.pad(asked, (int(name != "labels"), 0))[:, : tokens.shape[-1]]
    if told.shape != tokens.shape:
        return no_need  # it is refused where the logits are looked at
    if not (told[:, :-1] if name == "labels" else told).any():
        return no_need  # the next batch is looked at
    scored = labels[labels != IGNORED].to(tokens.device)
    look = Look(before, refusal, {name: _changed(tokens, told, scored)}, partial(known.add, kind))
    return look if name != "input_ids" else _with_shift(look, model, inputs, told, scored)


def _with_shift(
    look: Look, model: nn.Module, inputs: Mapping[str, Any], told: Tensor, scored: Tensor
) -> Look:
    """The look of a causal model, which also tells one that shifts its inputs itself."""
    tokens, mask = inputs["input_ids"], next(masks_in(inputs), None)
    text = told.any(dim=1, keepdim=True).expand(told.shape)
    if mask is not None and mask.shape == text.shape:
        text = text & (mask != 0).to(text.device)
    first = text & (text.cumsum(dim=1) == 1)
    late = LateLook(
        told & ((look.other["input_ids"] != tokens).cumsum(dim=1) > 0),
        first,
        {"input_ids": _changed(tokens, first, scored)},
        f"`{type(model).__name__}` should predict at each token the one that follows. Found that "
        "its logits at a token do not change with that token, as where a model shifts its inputs "
        "itself: they would be scored on the labels of other tokens. Shift no inputs in the model, "
        "or pass a loss of your own.",
    )
    # The last token of a row, which predicts none, tells too.
    return replace(look, at=F.pad(look.at, (0, 1)).to(told.device), late=late)


def _changed(tokens: Tensor, at: Tensor, scored: Tensor) -> Tensor:
    other = tokens.clone()
    other[at] = _another(tokens[at], scored)
    return other


def _another(told: Tensor, scored: Tensor) -> Tensor:
    """A token for all that are told, another one for one at least; of those that are scored.

    It is one, since a model without positions may not tell two that have changed places.

    >>> _another(torch.tensor([7, 7]), torch.tensor([5, 7, 7])), _another(*torch.tensor([[4], [4]]))
    (tensor([5]), tensor([3]))
    """
    last = told[-1:]
    if (told != last).any():
        return last
    others = scored[scored != last] if len(last) else scored
    return others[-1:] if len(others) else (last - 1).abs()


def _halves(labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the longest answer the places up to its second half, and those that ask for the latter.

    Nothing is asked of padding, which kernels let see all tokens where it has nothing else to see.

    >>> _halves(torch.tensor([[-100, 5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1, 1]]))
    (tensor([[False,  True,  True,  True, False]]), tensor([[False, False, False,  True,  True]]))
    """
    asked, read = labels != IGNORED, torch.ones_like(labels, dtype=torch.bool)
    if mask is not None:
        told = mask[:, : labels.shape[1]]
        # A mask of pairs does not tell of padding, which no answer is.
        read = told.to(labels.device, torch.bool) if told.shape == labels.shape else asked
    asked = asked & read
    row = torch.arange(len(asked), device=asked.device) == asked.sum(dim=1).argmax()
    read, asked = read & row[:, None], asked & row[:, None]
    so_far, half = asked.cumsum(dim=1), asked.sum() // 2
    return read & (so_far - asked.long() <= half), asked & (so_far > half)
