"""Whether a model keeps apart the texts that are packed into one row."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from geffect.batch import TOLD_BY, Batch, texts_in

from .undisturbed import undisturbed

_APART: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
"""Models that were seen to keep texts apart, with the kinds of inputs that they had."""


def check_apart(model: Any, batch: Batch, inputs: Mapping[str, Any]) -> None:
    """Refuse packed rows for a model in which a text sees those before it in its row.

    Found out by running it twice, once for each model, with other tokens in all texts of a row but
    the last: what the last one is predicted from should not change. With a mask, which may join
    texts in any batch, each batch is looked at.
    """
    if not isinstance(model, nn.Module) or "input_ids" not in inputs:
        return
    known, kind = _APART.setdefault(model, set()), _kind(model, inputs)
    if kind in known:
        return
    ids, texts = inputs["input_ids"], texts_in(batch).to(inputs["input_ids"].device)
    last = texts == texts.amax(dim=1, keepdim=True)
    other = torch.where(ids == ids.max(), ids.min(), ids.max())
    with undisturbed(model), torch.no_grad():
        before = model(**inputs).logits
        after = model(**{**inputs, "input_ids": ids.where(last, other)}).logits
    change = (after - before)[last].abs().max()
    if change > torch.finfo(before.dtype).eps ** 0.5 * before.abs().max():
        raise ValueError(
            f"`{type(model).__name__}` should keep the texts of a packed row apart. Found that "
            f"logits change by {change:.2g} with the tokens of another of its "
            f"{int(texts.max()) + 1} texts, told apart by {TOLD_BY}. "
            "Pass a text a row, padded as `geffect.data.collate.collate` does it; or pass "
            "`position_ids` that begin anew, without an `attention_mask` that joins the texts."
        )
    if "attention_mask" not in inputs:
        known.add(kind)


def _kind(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides whether texts are kept apart: the inputs, the kernel, and if rows are several.

    Kernels for rows without padding go by positions where there is one row alone.
    """
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return frozenset(inputs), kernel, len(inputs["input_ids"]) == 1
