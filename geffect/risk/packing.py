"""Whether a model keeps apart the texts that are packed into one row."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from geffect.batch import TOLD_BY, Batch, is_packed, labels_of, texts_in

from .dependence import Look, kind_of

_APART: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
"""Models that were seen to keep texts apart, with the kinds of inputs that they had."""


def look_apart(model: nn.Module, inputs: Mapping[str, Any], *, batch: Batch) -> Look:
    """A look at whether a text of packed rows sees those before it in its row.

    With other tokens in all texts of a row but the last, what the last one is predicted from should
    not change. There is need of it once for each model and kind of inputs; with a mask, which may
    join texts in any batch, for each batch.
    """

    def refusal(found: str) -> str:
        return (
            f"`{type(model).__name__}` should keep the texts of a packed row apart. Found that "
            f"logits change by {found} with the tokens of another text of their row, told apart by "
            f"{TOLD_BY}. Pass a text a row, padded as `geffect.data.collate.collate` does it; or "
            "pass `position_ids` that begin anew, without an `attention_mask` that joins the texts."
        )

    known = _APART.setdefault(model, set())
    # Kernels for rows without padding go by positions where there is one row alone.
    kind = kind_of(model, inputs), len(labels_of(batch)) == 1
    if kind in known or "input_ids" not in inputs or not is_packed(batch):
        return Look(torch.zeros_like(labels_of(batch), dtype=torch.bool), refusal)
    ids, texts = inputs["input_ids"], texts_in(batch).to(inputs["input_ids"].device)
    last = texts == texts.amax(dim=1, keepdim=True)
    other = torch.where(ids == ids.max(), ids.min(), ids.max())
    look = Look(last, refusal, {"input_ids": ids.where(last, other)})
    return look if "attention_mask" in inputs else replace(look, passed=partial(known.add, kind))
