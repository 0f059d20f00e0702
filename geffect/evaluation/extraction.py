"""Extraction strength: how much of an answer has to be given for the model to say the rest."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geffect.batch import IGNORED, check_one_answer, on_device
from geffect.risk import RiskSet, as_batches, label_logits, undisturbed


def extraction_strength(
    model: nn.Module,
    batches: RiskSet,
    *,
    ends: Collection[int] | None = None,
    include_end: bool = False,
) -> NDArray[np.float64]:
    """ES = 1 - k/n of every sample: 1 where the question alone brings the whole answer out.

    k is the smallest number of tokens of the answer y_1 ... y_n that have to stand behind the
    question for greedy decoding to say y_{k+1} ... y_n (arXiv 2406.09179). It is the place of the
    last token that is not the most likely one behind all of the answer before it: one forward tells
    it exactly. A wrong last token gives 0.

    - `ends`: tokens that end an answer; by default those of the model's configuration.
    - `include_end`: whether such a token at the end of an answer is part of it.

    Eval mode; the model stays as it was. Raises ValueError for a sample without an answer token.
    Where two tokens are nearly as likely, padding and precision may decide which is found.

    >>> from types import SimpleNamespace
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 9).float())
    >>> ids = torch.tensor([[1, 2, 3, 5], [1, 3, 4, 5]])
    >>> extraction_strength(Next(), {"input_ids": ids, "labels": ids}, ends=[5])
    array([1. , 0.5])
    """
    ended = set(_ends_of(model) if ends is None else ends)
    device = next(model.parameters(), torch.empty(0)).device
    found: list[float] = []
    with undisturbed(model), torch.no_grad():
        for batch in as_batches(batches):
            check_one_answer(batch, "an extraction strength")
            logits, labels = label_logits(model, on_device(batch, device))
            right = (logits.argmax(dim=-1) == labels).cpu()
            for row, answer in zip(right, labels.cpu(), strict=True):
                found.append(_strength(row, answer, set() if include_end else ended, len(found)))
    return np.array(found)


def _strength(right: Tensor, labels: Tensor, ended: set[int], index: int) -> float:
    (places,) = torch.where(labels != IGNORED)
    if len(places) and int(labels[places[-1]]) in ended:
        places = places[:-1]
    if not len(places):
        raise ValueError(
            "Each sample should have an answer token: a label that is not -100, before a token "
            f"that ends the answer. Found none in sample {index}. Leave it out, or mark its answer."
        )
    (wrong,) = torch.where(~right[places])
    return 1.0 - (int(wrong[-1]) + 1) / len(places) if len(wrong) else 1.0


def _ends_of(model: Any) -> list[int]:
    """The tokens that end a text, as a model is configured."""
    configured = (getattr(model, name, None) for name in ("generation_config", "config"))
    named = [getattr(config, "eos_token_id", None) for config in configured]
    return [
        token
        for given in named
        if given is not None
        for token in (given if isinstance(given, list | tuple) else [given])
    ]
