"""Whether a model keeps apart the texts that are packed into one row."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from geffect.batch import TOLD_BY, Batch, texts_in

from .dependence import change, kind_of

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
    known = _APART.setdefault(model, set())
    # Kernels for rows without padding go by positions where there is one row alone.
    kind = kind_of(model, inputs), len(inputs["input_ids"]) == 1
    if kind in known:
        return
    ids, texts = inputs["input_ids"], texts_in(batch).to(inputs["input_ids"].device)
    last = texts == texts.amax(dim=1, keepdim=True)
    other = torch.where(ids == ids.max(), ids.min(), ids.max())
    found = change(model, inputs, "input_ids", ids.where(last, other), last)
    if found:
        raise ValueError(
            f"`{type(model).__name__}` should keep the texts of a packed row apart. Found that "
            f"logits change by {found:.2g} with the tokens of another of its "
            f"{int(texts.max()) + 1} texts, told apart by {TOLD_BY}. "
            "Pass a text a row, padded as `geffect.data.collate.collate` does it; or pass "
            "`position_ids` that begin anew, without an `attention_mask` that joins the texts."
        )
    if found is not None and "attention_mask" not in inputs:
        known.add(kind)
